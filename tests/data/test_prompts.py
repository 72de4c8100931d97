import csv
import json
import textwrap
from pathlib import Path

import pytest
from datasets import Dataset
from omegaconf import OmegaConf
from torchtune.data import Message

from oprd_tune.data import HuggingFaceTokenizer, PromptDataset, PromptStream, prompt_dataset
from oprd_tune.errors import ConfigError
from oprd_tune.tiny import addition, tokenizer

ROWS = [{"question": f"{i}+{i}=", "result": str(2 * i), "other": None} for i in range(1, 30)]


def write(folder, suffix):
    path = folder / f"data{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        Dataset.from_list(ROWS).to_parquet(str(path))
    return str(path)


def load(source, **kwargs):
    columns = {"prompt_column": "question", "answer_column": "result", "prompt_template": "{prompt}"}
    return prompt_dataset(tokenizer(), source=source, **{**columns, **kwargs})


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_reads_local_files(tmp_path, suffix):
    data = load(write(tmp_path, suffix))
    assert len(data) == len(ROWS)
    tokens, answer = data[11]
    assert tokenizer().decode(tokens) == "12+12="
    assert answer == "24"
    assert data.answer_tokens(11) == (*tokenizer().encode("24"), tokenizer().eos_id)


def test_drops_empty_prompts_and_takes_answers_that_come_late(tmp_path):
    path = tmp_path / "late.jsonl"
    rows = [{"q": None if i == 3 else "1+1=", "a": "2" if i > 1500 else None} for i in range(1600)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(str(path), prompt_column="q", answer_column="a")
    assert (len(data), data.dropped, data.has_answers) == (1599, 1, False)
    assert data.counts == {"used": 1599, "dropped": 1, "empty": 1, "too_long": 0, "unanswered": 1500}


def test_takes_splits_and_the_first_rows(tmp_path):
    assert len(load(write(tmp_path, ".jsonl"), split="train[5:9]")) == 4
    assert len(load(write(tmp_path, ".jsonl"), first=3)) == 3


def test_drops_and_counts_prompts_that_are_too_long(tmp_path):
    data = load(write(tmp_path, ".jsonl"), max_prompt_tokens=4)
    assert (len(data), data.dropped) == (9, 20)
    assert (data.counts["empty"], data.counts["too_long"]) == (0, 20)


def test_wraps_prompts_in_a_plain_template(tmp_path):
    data = load(write(tmp_path, ".jsonl"), prompt_template="0+{prompt}")
    assert tokenizer().decode(data[0][0]) == "0+1+1="


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_column": "query"}, r"no column 'query'; it has question, result, other"),
        ({"answer_column": "gold"}, r"no column 'gold'"),
        ({"max_prompt_tokens": 1}, "all 29 prompts are empty or longer than max_prompt_tokens 1"),
        ({"prompt_template": "Q:"}, r"must contain \{prompt\}"),
        ({"system_prompt": "Be brief."}, "write it into prompt_template"),
        ({"prompt_template": None}, "no chat template"),
        ({"split": "test"}, "cannot be loaded"),
    ],
)
def test_mistakes_are_explained(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, ".jsonl"), **arguments)


def test_a_missing_file_and_missing_answers_are_explained(tmp_path):
    with pytest.raises(ConfigError, match="there is no file"):
        load(str(tmp_path / "nothing.jsonl"))
    data = load(write(tmp_path, ".jsonl"), answer_column=None)
    assert not data.has_answers
    with pytest.raises(ConfigError, match="give dataset.answer_column"):
        data.answer_tokens(0)


TEMPLATE = (
    "{%- for message in messages %}\n    {{- message.role + ':' + message.content | trim + eos_token }}\n"
    "{%- endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture
def chat_folder(tmp_path):
    from oprd_tune.tiny.model import write_tokenizer

    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 14]}))
    return tmp_path


def test_chat_template_renders_as_in_transformers(chat_folder):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(chat_folder)
    ours = HuggingFaceTokenizer(str(chat_folder))
    turns = [("system", "1 2"), ("user", "3+4="), ("assistant", "")]
    ids, _ = ours.tokenize_messages([Message(role=r, content=c) for r, c in turns])
    conversation = [{"role": r, "content": c} for r, c in turns[:2]]
    wanted = reference.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert ids == wanted
    assert ours.stop_tokens == [1, 14]


SWITCH = TEMPLATE + "{% if add_generation_prompt and think is defined and not think %}{{ '=' * count }}{% endif %}"


def test_variables_of_a_chat_template_reach_it_as_in_transformers(chat_folder):
    from transformers import AutoTokenizer

    (chat_folder / "chat_template.jinja").write_text(SWITCH)
    reference = AutoTokenizer.from_pretrained(chat_folder)
    turns = [Message(role="user", content="3+4="), Message(role="assistant", content="")]
    for variables in ({"think": False, "count": 2}, {"think": True}, {}, None):
        ours = HuggingFaceTokenizer(str(chat_folder), chat_template_kwargs=OmegaConf.create(variables))
        conversation = [{"role": "user", "content": "3+4="}]
        wanted = reference.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=False, **(variables or {})
        )
        assert ours.tokenize_messages(turns)[0] == wanted
        silent = variables == {"think": False, "count": 2}
        assert (wanted[-2:] == reference.encode("==", add_special_tokens=False)) == silent


@pytest.mark.parametrize(
    ("template", "variables", "message"),
    [
        (SWITCH, {"thinking": True}, "the chat template has no variable thinking; it has count, think"),
        (SWITCH, {"messages": []}, "no variable messages"),
        (TEMPLATE, {"think": True}, "no variable think; it has none"),
        ("{% if %}", {"think": True}, "the chat template cannot be read"),
        (SWITCH, "think", "give variables and values"),
        (None, {"think": True}, "has no chat template; leave it out"),
    ],
)
def test_variables_that_a_chat_template_does_not_read_are_an_error(chat_folder, template, variables, message):
    if template is None:
        path = chat_folder / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    else:
        (chat_folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match=message):
        HuggingFaceTokenizer(str(chat_folder), chat_template_kwargs=variables)


def test_data_uses_the_chat_template_and_the_system_prompt(chat_folder):
    ours = HuggingFaceTokenizer(str(chat_folder))
    rows = Dataset.from_dict({"prompt": ["3+4="], "answer": ["7"]})
    plain, with_system = (PromptDataset(rows, ours, system_prompt=s)[0][0] for s in (None, "1 2"))
    assert len(with_system) == len(plain) + len("system:1 2") + 1  # and its EOS


def test_a_folder_without_tokenizer_is_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        HuggingFaceTokenizer(str(tmp_path))


def test_the_splits_of_the_tiny_task_are_disjoint():
    train = addition(tokenizer(), split="train", count=3000)
    held_out = addition(tokenizer(), split="held_out", count=500, seed=1)
    assert not {train[i][0] for i in range(3000)} & {held_out[i][0] for i in range(500)}
    assert {len(train[i][1]) for i in range(3000)} == {1, 2, 3, 4}
    with pytest.raises(ValueError, match="'train' and 'held_out'"):
        addition(tokenizer(), split="test", count=1)


def stream(size=10, per_step=4, **kwargs):
    rows = Dataset.from_dict({"prompt": [str(i) for i in range(size)], "answer": ["0"] * size})
    data = PromptDataset(rows, tokenizer(), prompt_template="{prompt}")
    return PromptStream(data, prompts_per_step=per_step, **{"seed": 3, **kwargs})


def test_each_pass_uses_every_prompt_once_in_another_order():
    steps = [stream().at_step(i) for i in range(5)]
    order = [tokens for step in steps for tokens in step.tokens]
    assert sorted(order[:10]) == sorted(order[10:]) == sorted(stream().at(list(range(10))).tokens)
    assert order[:10] != order[10:]
    assert [p for step in steps for p in step.positions] == list(range(20))


def test_the_stream_is_a_function_of_its_position_and_seed():
    assert stream().at_step(3) == stream().at_step(3)
    assert stream(seed=4).at_step(3) != stream().at_step(3)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_a_step_without_overlap(world_size):
    whole = stream().at_step(2)
    parts = [stream(rank=r, world_size=world_size).at_step(2) for r in range(world_size)]
    by_position = {p: t for part in parts for p, t in zip(part.positions, part.tokens, strict=True)}
    assert [by_position[p] for p in whole.positions] == list(whole.tokens)
    assert sum(map(len, parts)) == len(whole)


def test_the_data_set_that_the_guide_shows_works():
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text().partition("## Add a data set")[2]
    namespace = {}
    exec(textwrap.dedent(guide.partition("```python\n")[2].partition("```")[0]), namespace)
    dataset = namespace["doubles"](tokenizer(), count=20, max_prompt_tokens=5)
    assert len(dataset) + dataset.dropped == 20
    assert dataset[7][1] == "14"
    assert tokenizer().decode(dataset[7][0]) == "7+7="
