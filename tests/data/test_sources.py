"""What a file says is what a data set holds, and a mistake in it is named by its line."""

import json

import pytest
from datasets import Dataset

from oprd_tune.data import prompt_dataset
from oprd_tune.data.chats import as_answer
from oprd_tune.data.sources import column, read_columns
from oprd_tune.errors import ConfigError
from oprd_tune.tiny import tokenizer


def read(path, split="train"):
    return {name: list(values) for name, values in read_columns(str(path), split, None).items()}


def test_json_keeps_what_is_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '\ufeff{"a": 1, "b": "x\u2028y\u0085z"}\r\n\n{"a": "2"}\n  {"a": 1.50, "c": [{"d": null}]}', "utf-8"
    )
    found = read(path)
    assert [str(a) for a in found["a"]] == ["1", "2", "1.50"]
    assert found["b"] == ["x\u2028y\u0085z", None, None]
    assert found["c"] == [None, None, [{"d": None}]]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_may_be_one_list(tmp_path, indent):
    path = tmp_path / "rows.json"
    path.write_text("\n" + json.dumps([{"a": 1}, {"a": 2}], indent=indent))
    assert read(path) == {"a": [1, 2]}


def test_csv_is_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('q,"a, b"\n007,1.50\n"two\nlines",NA\n,"say ""x"""\n\nnull,\n', "utf-8-sig")
    assert read(path) == {"q": ["007", "two\nlines", None, "null"], "a, b": ["1.50", "NA", 'say "x"', None]}


@pytest.mark.parametrize(
    ("split", "rows"), [("train[2:4]", [2, 3]), ("train[:30%]", [0, 1, 2]), ("train[:1]+train[-1:]", [0, 9])]
)
def test_slices_of_a_file(tmp_path, split, rows):
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    lines.write_text("".join(f'{{"a": {i}}}\n' for i in range(10)))
    Dataset.from_dict({"a": list(range(10))}).to_parquet(str(table))
    assert read(lines, split) == read(table, split) == {"a": rows}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"a": 1}\n\n{"a": 2\n{"a": 3}\n',
            r"a.jsonl, line 3: this is not JSON \(.*\); give one object a line",
        ),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "a.json, line 2: this is not JSON"),
        ("a.json", '{\n "a": 1\n}', "a.json, line 1: this is not JSON"),
        ("a.jsonl", '{"a": 1}\n"b"\n', "a.jsonl, line 2: 'b' is no object"),
        ("a.json", '[{"a": 1}, 2]', "a.json, line 1: 2 is no object"),
        ("a.csv", "a,b\n1,2\n3\n", "a.csv, line 3 cannot be read: it has 1 fields, but the header has 2"),
        ("a.csv", 'a\n"1', "a.csv, line 2 cannot be read"),
        ("a.parquet", "PAR", "cannot be loaded"),
    ],
)
def test_a_broken_line_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl, line 2 is no UTF-8 text"),
        ("a.json", b'[{"a": 1},\n\n {"a": "\xff"}]', "a.json, line 3 is no UTF-8 text"),
        ("a.csv", b"a\n1\n\xff\n", "a.csv, after line [0-9]: this is no UTF-8 text"),
        ("a.jsonl", bytes(range(256)) * 1000, "a.jsonl, line 1"),
        ("a.jsonl", b"\x00" * 100_000, "a.jsonl, line 1: this is not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1 cannot be read: maximum recursion"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "a.jsonl, line 1 cannot be read: Exceeds the limit"),
        ("a.jsonl", b"", "a.jsonl is empty; give a file with rows"),
        ("a.csv", b"", "a.csv is empty; give a file with rows"),
        ("a.csv", b"a\n" + b"x" * 200_000, "a.csv, line 2 cannot be read: field larger than field limit"),
    ],
)
def test_a_file_that_is_no_text_or_no_rows(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / name)


def test_lines_and_files_have_a_limit(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"a": 1}\n{"a": "')
        file.truncate(200 * 2**20)
    with pytest.raises(ConfigError, match="a.jsonl, line 2 has more than 64 MiB; a line holds one row"):
        read(path)
    monkeypatch.setattr("oprd_tune.data.sources._LARGEST_FILE", 2**20)
    for name in ("a.jsonl", "a.csv"):
        path = path.rename(tmp_path / name)
        with pytest.raises(ConfigError, match="are read into memory; cut it to the rows that the run needs"):
            read(path)


def test_long_whole_numbers_and_numbers_in_quotes_stay(tmp_path):
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.csv"
    lines.write_text('{"a": 12345678901234567890123}\n{"a": "007"}\n{"a": 2.50}\n{"a": "null"}\n')
    table.write_text('question,answer\n12+30=,"42"\n1+1=,"2.5"\n1,007\n2,2.50\n3,null\n')
    assert [as_answer(a, "") for a in read(lines)["a"]] == ["12345678901234567890123", "007", "2.50", "null"]
    assert [as_answer(a, "") for a in read(table)["answer"]] == ["42", "2.5", "007", "2.50", "null"]


def test_a_field_of_a_struct_is_named_by_a_dot(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "1", "info": {"answer": "007"}}')
    given = {"source": str(path), "prompt_column": "q", "prompt_template": "{prompt}"}
    with pytest.raises(ConfigError, match="or name a field of it by a dot, as in `COLUMN.answer`"):
        prompt_dataset(tokenizer(), answer_column="info", **given)
    assert prompt_dataset(tokenizer(), answer_column="info.answer", **given)[0][1] == "007"


@pytest.mark.parametrize("value", ['["42"]', '{"answer": "42"}', '[{"role": "user"}]'])
def test_a_list_or_a_struct_is_no_answer(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"q": "1", "a": {value}}}')
    with pytest.raises(ConfigError, match="row 0 of column 'a' in .*; allowed are text, numbers, true and false"):
        prompt_dataset(tokenizer(), source=str(path), prompt_column="q", answer_column="a", prompt_template="{prompt}")
    with pytest.raises(ConfigError, match="row 0 of column 'a' in .* allowed are text, and a list|without content"):
        prompt_dataset(tokenizer(), source=str(path), prompt_column="a", prompt_template="{prompt}")


COLUMNS = {"a": [{"b": {"c": 1}, "d": 2}, None, {"b": None}], "a.b": [7, 8, 9], "n": [None, 1, 2]}


@pytest.mark.parametrize(
    ("name", "values"), [("a.b.c", [1, None, None]), ("a.d", [2, None, None]), ("a.b", [7, 8, 9]), ("n", [None, 1, 2])]
)
def test_dots_lead_into_structs(name, values):
    assert column(COLUMNS, name, source="s", first=None) == values
    assert column(COLUMNS, name, source="s", first=1) == values[:1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x", r"s has no column 'x'; it has a, a.b, n"),
        ("x.y", r"s has no column 'x.y'"),
        ("a.x", r"no column 'a.x': a has no field 'x'; it has \['b', 'd'\]"),
        ("a.b.x", r"a.b has no field 'x'; it has \['c'\]"),
        ("n.x", "n holds int, which has no fields"),
    ],
)
def test_missing_columns_and_fields(name, message):
    with pytest.raises(ConfigError, match=message):
        column(COLUMNS, name, source="s", first=None)
