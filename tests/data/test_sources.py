"""What a file says is what a data set holds, and a mistake in it is named by its line."""

import json

import pytest
from datasets import Dataset

from oprd_tune.data.sources import column, read_columns
from oprd_tune.errors import ConfigError


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


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match="cannot be loaded: 'utf-8' codec"):
        read(tmp_path / "a.jsonl")


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
