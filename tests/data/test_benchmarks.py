"""Data sets by name: their rows are read from small files in the layouts of the hub and of verl."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from oprd_tune.data import HuggingFaceTokenizer, prompt_dataset
from oprd_tune.data.benchmarks import BENCHMARKS, INSTRUCTIONS, Benchmark, find_benchmark, with_instruction
from oprd_tune.errors import ConfigError
from oprd_tune.grading.answers import reference_text
from oprd_tune.tiny import tokenizer
from tests.data.folders import write_folder

ROOT = Path(__file__).parents[2]
BOXED = INSTRUCTIONS["boxed"]
HUB = {  # a row as each hub version has it, and the answer that counts
    "aime24": ({"id": 60, "problem": "1+1=", "solution": "\\boxed{204}", "url": "u"}, "204"),
    "aime25": ({"problem": "1+1=", "answer": "70", "id": "0"}, "70"),
    "aimo": ({"id": 0, "problem": "1+1=", "solution": "\\boxed{1}", "answer": "116", "url": "u"}, "116"),
    "amc23": ({"id": 0, "question": "1+1=", "answer": "27.0", "url": "u"}, "27.0"),
    "math500": ({"problem": "1+1=", "solution": "s", "answer": "\\frac12", "subject": "a", "level": 2}, "\\frac12"),
    "gsm8k": ({"question": "1+1=", "answer": "48/2 = 24\n#### 1,024"}, "1,024"),
    "minerva": ({"question": "1+1=", "answer": "4.5e33"}, "4.5e33"),
    "olympiad": ({"id": 1, "question": "1+1=", "final_answer": ["$2$"], "unit": None}, "$2$"),
    "dapo_math_17k": ({"prompt": "1+1=", "solution": "34", "reward_model": {"ground_truth": "34"}}, "34"),
    "deepmath": ({"question": "1+1=", "final_answer": "0", "difficulty": 4.5, "r1_solution_1": "s"}, "0"),
    "gsm8k_train": ({"question": "1+1=", "answer": "#### 72"}, "72"),
}
VERL = {
    "data_source": "d",
    "prompt": [{"role": "user", "content": "1+1="}],
    "reward_model": {"style": "rule", "ground_truth": "34"},
    "extra_info": {"index": 3},
}


def write(folder, rows, suffix=".jsonl"):
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def seen(monkeypatch):
    """The rows that `prompt_dataset` makes, before they are tokenized."""
    rows = []
    monkeypatch.setattr(
        "oprd_tune.data.prompt_sources.PromptDataset", lambda found, *_, **__: rows.extend(found) or rows
    )
    return rows


def load(**arguments):
    return prompt_dataset(tokenizer(), **arguments)


def test_every_name_has_a_row_here():
    assert HUB.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", HUB)
def test_rows_of_the_hub_are_read(tmp_path, seen, name, suffix):
    row, answer = HUB[name]
    load(benchmark=name, path=write(tmp_path, [row, row], suffix))
    assert [row["prompt"] for row in seen] == [f"1+1=\n\n{BOXED}"] * 2
    assert reference_text(seen[0]["answer"]) == answer


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ["gsm8k", "math500", "dapo_math_17k", "deepmath"])
def test_rows_of_verl_are_read(tmp_path, seen, name, suffix):
    load(benchmark=name, path=write(tmp_path, [VERL], suffix))
    assert seen == [{"prompt": VERL["prompt"], "answer": "34"}]  # verl's prompts hold an instruction already
    load(benchmark=name, path=write(tmp_path, [VERL], suffix), instruction="boxed")
    assert seen[1]["prompt"] == [{"role": "user", "content": f"1+1=\n\n{BOXED}"}]


def test_explicit_columns_come_before_verls_layout(tmp_path):
    with pytest.raises(ConfigError, match=r"no column 'final_answer'"):
        load(benchmark="deepmath", path=write(tmp_path, [VERL]), prompt_column="prompt")


def test_explicit_arguments_override(tmp_path, seen):
    row = {"question": "2+2=", "answer": "4", "text": "3+3=", "gold": "6"}
    path = write(tmp_path, [row, row, row])
    load(benchmark="gsm8k", path=path, prompt_column="text", answer_column="gold", split="train[1:]", first=1)
    assert seen == [{"prompt": f"3+3=\n\n{BOXED}", "answer": "6"}]


def test_an_answer_may_be_a_list_of_texts(tmp_path, seen):
    rows = [{"question": "1+1=", "final_answer": found} for found in (["1", "2"], [], None)]
    load(benchmark="olympiad", path=write(tmp_path, rows))
    assert [row["answer"] for row in seen] == ["1, 2", None, None]
    with pytest.raises(ConfigError, match="is a list of str"):
        load(source=write(tmp_path, rows), answer_column="final_answer")


def test_the_hub_is_asked_for_the_pinned_commit(monkeypatch, seen):
    asked = []

    def load_dataset(*names, **more):
        asked.append((*names, more))
        return Dataset.from_list([HUB["gsm8k"][0]])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    load(benchmark="gsm8k")
    load(benchmark="gsm8k", split="train[:9]", revision="main")
    load(source="a/b", revision="v1")
    commit = BENCHMARKS["gsm8k"].revision
    assert asked == [
        ("openai/gsm8k", "main", {"split": "test", "revision": commit}),
        ("openai/gsm8k", "main", {"split": "train[:9]", "revision": "main"}),
        ("a/b", None, {"split": "train", "revision": "v1"}),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "dataset needs a source: a hub name or a file. Or give a benchmark: aime24, "),
        ({"benchmark": "aime2024"}, "dataset.benchmark 'aime2024' is not known; did you mean 'aime24'"),
        ({"benchmark": "gsm8k", "source": "openai/gsm8k"}, "both say where the prompts are; leave one out"),
        ({"path": "rows.jsonl"}, "dataset.path 'rows.jsonl' is a file with the rows of .*; give source instead"),
        ({"benchmark": "gsm8k", "path": "rows.jsonl", "subset": "main"}, "dataset.subset is for the hub"),
        ({"benchmark": "gsm8k", "path": "rows.jsonl"}, "there is no file rows.jsonl"),
        ({"benchmark": 8}, "dataset.benchmark 8 is not known; known are aime24"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load(**arguments)


def test_a_file_has_no_revision(tmp_path):
    path = write(tmp_path, [{"prompt": "1+1="}])
    with pytest.raises(ConfigError, match="dataset.revision 'main' is for the hub, but .* is a file; leave it out"):
        load(source=path, revision="main")
    with pytest.raises(
        ConfigError, match="dataset.instruction is 'boxd'; give boxed, none, or a text of several words"
    ):
        load(source=path, instruction="boxd")


@pytest.mark.parametrize(
    ("instruction", "end"), [("boxed", f"\n\n{BOXED}"), ("none", ""), ("Be brief.", "\n\nBe brief.")]
)
def test_instructions(tmp_path, seen, instruction, end):
    load(source=write(tmp_path, [{"prompt": "1+1="}]), instruction=instruction)
    load(benchmark="aime25", path=write(tmp_path, [HUB["aime25"][0]]), instruction=instruction)
    assert [row["prompt"] for row in seen] == [f"1+1={end}"] * 2


def test_a_data_set_of_ones_own_gets_no_instruction(tmp_path, seen):
    load(source=write(tmp_path, [{"prompt": "1+1="}]))
    assert seen == [{"prompt": "1+1=", "answer": None}]


def test_the_instruction_ends_the_last_message_of_the_user():
    user, tool = {"role": "user", "content": "1+1="}, {"role": "tool", "content": "2"}
    chat = [{"role": "system", "content": "s"}, {**user, "name": "n"}, tool]
    changed = with_instruction(chat, "Be brief.", "row 0")
    assert changed == [chat[0], {"role": "user", "name": "n", "content": "1+1=\n\nBe brief."}, tool]
    assert chat[1]["content"] == "1+1="
    assert with_instruction(changed, "Be brief.", "row 0") == changed
    assert with_instruction("1+1= Be brief.", "Be brief.", "row 0") == "1+1= Be brief."
    assert with_instruction(None, "Be brief.", "row 0") is None
    assert with_instruction("", "Be brief.", "row 0") == ""
    with pytest.raises(ConfigError, match="row 0 has no message of the user's"):
        with_instruction([tool], "Be brief.", "row 0")


def test_the_chat_template_renders_the_instruction(tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    ours = HuggingFaceTokenizer(str(write_folder(folder)))
    path = write(tmp_path, [{"question": "12", "answer": "#### 3"}])
    data = prompt_dataset(ours, benchmark="gsm8k", path=path, instruction="The cat?")
    expected = prompt_dataset(ours, source=write(tmp_path, [{"prompt": "12\n\nThe cat?"}]))
    assert data[0][0] == expected[0][0]


def test_commits_are_whole_and_columns_are_given():
    for found in BENCHMARKS.values():
        assert found.revision is None or re.fullmatch("[0-9a-f]{40}", found.revision)
        assert found.prompt_column
        assert found.answer_column
        assert found.instruction == "boxed"
    assert find_benchmark(None, "a/b", None, split=None) == Benchmark("a/b")


def test_every_name_is_documented():
    page = (ROOT / "docs" / "data.md").read_text()
    for name, found in BENCHMARKS.items():
        assert re.search(rf"\| `{name}` \| `{found.source}`.*\| {found.split} \|", page), name
    assert INSTRUCTIONS["boxed"] in page
