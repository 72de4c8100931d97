"""Prompts as people have them: chat messages, structs in tables, whole conversations; and answers of every type."""

import datetime
import json

import pytest
from datasets import Dataset

from oprd_tune.data import HuggingFaceTokenizer, PromptDataset, prompt_dataset
from oprd_tune.data.chats import as_answer
from oprd_tune.errors import ConfigError

from .folders import TEMPLATE, write_folder


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def part(text):
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return HuggingFaceTokenizer(str(folder))


@pytest.fixture(scope="module")
def reference(folder):
    """The ids of a chat by transformers."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder))
    return lambda chat: tuple(loaded.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def write(folder, rows, suffix=".jsonl"):
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SEVERAL = [system("Be brief."), user("12"), assistant("no"), user("The cat?")]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["prompt", "extra.chat"])
def test_messages_are_read_as_in_transformers(tmp_path, tokenizer, reference, suffix, column):
    chats = [SEVERAL, [user("1")], [user("call"), {"role": "tool", "content": "42"}]]
    rows = [{"prompt": chat, "extra": {"chat": chat}} for chat in chats]
    data = prompt_dataset(tokenizer, source=write(tmp_path, rows, suffix), prompt_column=column)
    assert [data[i] for i in range(3)] == [(reference(chat), None) for chat in chats]


def test_rows_in_memory_take_messages_too(tokenizer, reference):
    rows = [{"prompt": SEVERAL, "answer": 18}, {"prompt": "1+1", "answer": None}]
    data = PromptDataset(rows, tokenizer)
    assert data[0] == (reference(SEVERAL), "18")
    assert data[1] == (reference([user("1+1")]), None)


def test_parts_of_text_are_joined(tokenizer, reference):
    rows = [{"prompt": [system([part("a"), part(" b")]), user([part("c")])]}]
    assert PromptDataset(rows, tokenizer)[0][0] == reference([system("a b"), user("c")])


def test_the_system_prompt_comes_first(tokenizer, reference):
    data = PromptDataset([{"prompt": [user("1")]}, {"prompt": "2"}], tokenizer, system_prompt="S")
    assert [data[i][0] for i in (0, 1)] == [reference([system("S"), user(text)]) for text in "12"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_verls_rows(tmp_path, tokenizer, reference, suffix):
    rows = [{"prompt": [user(q)], "reward_model": {"style": "rule", "ground_truth": a}} for q, a in ("12", "34")]
    source = write(tmp_path, rows, suffix)
    data = prompt_dataset(tokenizer, source=source, answer_column="reward_model.ground_truth")
    assert [data[i] for i in (0, 1)] == [(reference([user(q)]), a) for q, a in ("12", "34")]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_conversations_answer_themselves(tmp_path, tokenizer, reference, suffix):
    rows = [
        {"messages": [*SEVERAL, assistant("yes")], "gold": "1"},
        {"messages": [user("1"), assistant("2")], "gold": "2"},
        {"messages": [user("open")], "gold": "3"},
    ]
    prompts = [reference(SEVERAL), reference([user("1")]), reference([user("open")])]
    source = write(tmp_path, rows, suffix)
    data = prompt_dataset(tokenizer, source=source)
    assert [data[i] for i in range(3)] == list(zip(prompts, ["yes", "2", None], strict=True))
    data = prompt_dataset(tokenizer, source=source, answer_column="gold")
    assert [data[i] for i in range(3)] == list(zip(prompts, "123", strict=True))


@pytest.mark.parametrize(
    ("columns", "taken"),
    [
        (["problem", "question", "messages", "prompt"], "prompt"),
        (["problem", "question", "messages"], "messages"),
        (["problem", "question"], "question"),
        (["problem", "text"], "problem"),
    ],
)
def test_the_column_of_the_prompts_by_default(tmp_path, tokenizer, reference, columns, taken):
    source = write(tmp_path, [{name: name for name in columns}])
    assert prompt_dataset(tokenizer, source=source)[0][0] == reference([user(taken)])


def test_none_of_the_default_columns(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"none of the columns prompt, messages, .* It has \['text', 'label'\]"):
        prompt_dataset(tokenizer, source=write(tmp_path, [{"text": "a", "label": 1}]))


KEYS = "{% for m in messages %}{{ m | tojson(sort_keys=true) }}{% endfor %}"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_further_fields_reach_the_template_without_what_the_table_adds(tmp_path, suffix):
    ours = HuggingFaceTokenizer(str(write_folder(tmp_path / "t", {"eos_token": "<eos>", "chat_template": KEYS})))
    call = {"name": "f", "arguments": {"a": 1}}
    other = {"name": "g", "arguments": {"b": "x"}}
    rows = [
        {"prompt": [user("1"), assistant(None, tool_calls=[call]), {"role": "tool", "content": "3", "name": "f"}]},
        {"prompt": [user("1"), assistant("so", tool_calls=[other]), user("2")]},
    ]
    data = prompt_dataset(ours, source=write(tmp_path, rows, suffix))
    wanted = [{k: "" if v is None else v for k, v in m.items()} for m in rows[0]["prompt"]]
    assert ours.decode(data[0][0]) == "".join(json.dumps(m, sort_keys=True) for m in wanted)
    assert ours.decode(data[1][0]) == "".join(json.dumps(m, sort_keys=True) for m in rows[1]["prompt"])


def test_empty_prompts_are_dropped(tokenizer):
    empty = [None, "", [], [system("S"), user("")], [user([])]]
    data = PromptDataset([{"prompt": prompt} for prompt in [*empty, "1"]], tokenizer)
    assert (len(data), data.dropped) == (1, 5)


def test_long_conversations_are_dropped(tokenizer, reference):
    longest = len(reference(SEVERAL))
    for limit, kept in ((longest, 2), (longest - 1, 1)):
        data = PromptDataset([{"prompt": SEVERAL}, {"prompt": "1"}], tokenizer, max_prompt_tokens=limit)
        assert (len(data), data.dropped) == (kept, 2 - kept)


def test_a_teacher_reads_the_same_messages_with_its_own_template(tmp_path, tokenizer, reference):
    template = TEMPLATE.replace("<|start|>", "# ")
    teacher = HuggingFaceTokenizer(str(write_folder(tmp_path, {"eos_token": "<eos>", "chat_template": template})))
    for arguments in ({}, {"teacher_prompt_template": "chat"}):
        data = PromptDataset([{"prompt": SEVERAL}], tokenizer, teacher_tokenizer=teacher, **arguments)
        assert data[0][0] == reference(SEVERAL)
        assert list(data.teacher_prompt(0)) == teacher.tokenize_chats([SEVERAL])[0]
        assert data.as_teacher_reads()[0][0] == data.teacher_prompt(0) != data[0][0]
    with pytest.raises(ConfigError, match="give `chat` as dataset.teacher_prompt_template, or a list"):
        PromptDataset([{"prompt": SEVERAL}], tokenizer, teacher_tokenizer=teacher, teacher_prompt_template="{prompt}")


class OneByOne:
    """A tokenizer with no more than the protocol's members, like torchtune's."""

    def __init__(self, tokenizer):
        self.encode, self.decode = tokenizer.encode, tokenizer.decode
        self.tokenize_messages = tokenizer.tokenize_messages


def test_other_tokenizers_are_asked_chat_by_chat(tokenizer):
    rows = [{"prompt": SEVERAL}, {"prompt": "1"}]
    for arguments in ({}, {"system_prompt": "S"}, {"prompt_template": "Q: {prompt}"}):
        chosen = rows[1:] if arguments else rows
        one, at_once = (PromptDataset(chosen, t, **arguments) for t in (OneByOne(tokenizer), tokenizer))
        assert [one[i] for i in range(len(chosen))] == [at_once[i] for i in range(len(chosen))]
    with pytest.raises(ConfigError, match=r"the fields \['name'\], which OneByOne does not read"):
        PromptDataset([{"prompt": [{**user("1"), "name": "n"}]}], OneByOne(tokenizer))


def test_batches_keep_the_order(tokenizer, monkeypatch):
    monkeypatch.setattr("oprd_tune.data.prompts._AT_ONCE", 3)
    texts = [str(i) * (i % 3) for i in range(20)]
    data = PromptDataset([{"prompt": text, "answer": text} for text in texts], tokenizer)
    assert [data[i] for i in range(len(data))] == [
        (tuple(tokenizer.tokenize_chats([[user(text)]])[0]), text) for text in texts if text
    ]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (12, r"row 1 of column 'p' in \S+ is int 12; allowed are text, and a list of chat messages"),
        (True, "is bool True"),
        (["a", "b"], "is a list of str 'a'"),
        ({"text": "a"}, "is a struct with the fields text; allowed"),
        ([{"from": "human", "value": "a"}], "is a list of a struct with the fields from, value"),
        ([{"role": 1, "content": "a"}], "is a list of a struct with the fields role, content"),
        ([user("a"), assistant("b")], "ends with a message of the assistant's.*take it out, or name the column"),
        ([system("a")], "ends with a message of 'system'; the last one is of `user` or `tool`"),
        ([user(None)], "a message of 'user' without content"),
        ([user(3)], "a message with content int 3; allowed are text and parts of type 'text'"),
        ([user([{"type": "image_url", "image_url": "x"}])], "content 'image_url'; allowed"),
        ([user(["a"])], "content str 'a'; allowed"),
    ],
)
def test_other_types_of_prompts_are_an_error(tmp_path, tokenizer, prompt, message):
    rows = [{"p": "fine"}, {"p": prompt}]
    with pytest.raises(ConfigError, match=message):
        prompt_dataset(tokenizer, source=write(tmp_path, rows), prompt_column="p")
    with pytest.raises(ConfigError, match=message.removeprefix(r"row 1 of column 'p' in \S+ ")):
        PromptDataset([{"prompt": row["p"]} for row in rows], tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"system_prompt": "S"},
            "the prompt of row 1 has a system message of its own; leave out dataset.system_prompt",
        ),
        (
            {"prompt_template": "Q: {prompt}"},
            "the prompt of row 1 is a list of chat messages, and only a chat template",
        ),
    ],
)
def test_settings_that_messages_do_not_take(tokenizer, arguments, message):
    with pytest.raises(ConfigError, match=message):
        PromptDataset([{"prompt": "1"}, {"prompt": SEVERAL}], tokenizer, **arguments)


# ---- answers ----


@pytest.mark.parametrize(
    ("suffix", "answers", "wanted"),
    [
        (".jsonl", '18 1.50 1.0 1e3 -0.0 12345678901234567890 "007" true null NaN "1.50" "2024-01-02"', None),
        (".parquet", [18, None, -3], ["18", None, "-3"]),
        (".parquet", [18.0, None, 2.5, 1e300, float("nan")], ["18", None, "2.5", "1e+300", None]),
        (".parquet", [True, False], ["true", "false"]),
        (".parquet", ["1.50", None, "007"], ["1.50", None, "007"]),
    ],
)
def test_numbers_keep_their_written_form(tmp_path, tokenizer, suffix, answers, wanted):
    if suffix == ".jsonl":
        written = answers.split()
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(f'{{"prompt": "1", "a": {answer}}}\n' for answer in written))
        wanted = [None if answer in ("null", "NaN") else answer.strip('"') for answer in written]
    else:
        source = write(tmp_path, [{"prompt": "1", "a": answer} for answer in answers], suffix)
    data = prompt_dataset(tokenizer, source=str(source), answer_column="a")
    assert [data[i][1] for i in range(len(data))] == wanted


@pytest.mark.parametrize("answer", [["1"], {"a": "1"}, b"1", datetime.date(2024, 1, 2), [assistant("1")]])
def test_other_types_of_answers_are_an_error(tokenizer, answer):
    with pytest.raises(ConfigError, match="the answer of row 0 is .*; allowed are text, numbers, true and false"):
        PromptDataset([{"prompt": "1", "answer": answer}], tokenizer)


def test_large_whole_floats_are_not_made_up():
    assert as_answer(2.0**53, "") == "9007199254740992.0"
    assert as_answer(2.0**53 - 1, "") == "9007199254740991"
