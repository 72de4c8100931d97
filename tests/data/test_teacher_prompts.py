import json

import pytest
from datasets import Dataset

from oprd_tune.data import HuggingFaceTokenizer, PromptDataset, PromptStream, prompt_dataset
from oprd_tune.errors import ConfigError
from oprd_tune.tiny import addition, tokenizer
from oprd_tune.tiny.model import write_tokenizer

STUDENTS, TEACHERS = ("{% for m in messages %}" + mark + "{{ m.content }}{% endfor %}" for mark in "+=")


def with_chat(folder, template, last_id=None):
    """The tiny tokenizer with a chat template, and on demand with its symbols' ids counted down from another one."""
    write_tokenizer(folder)
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    if last_id is not None:
        definition["model"]["vocab"] = {s: i if i < 2 else last_id - i for s, i in definition["model"]["vocab"].items()}
    path.write_text(json.dumps(definition))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return HuggingFaceTokenizer(str(folder))


@pytest.fixture
def student(tmp_path):
    (tmp_path / "student").mkdir()
    return with_chat(tmp_path / "student", STUDENTS)


@pytest.fixture
def teacher(tmp_path):
    (tmp_path / "teacher").mkdir()
    return with_chat(tmp_path / "teacher", TEACHERS, last_id=30)


def data(student, teacher, prompts=("1", "23"), **kwargs):
    rows = Dataset.from_dict({"prompt": list(prompts), "answer": ["0"] * len(prompts)})
    return PromptDataset(rows, student, teacher_tokenizer=teacher, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "of_student", "of_teacher"),
    [
        ({}, "+1", "=1"),
        ({"system_prompt": "7"}, "+7+1", "=7=1"),
        ({"prompt_template": "2{prompt}"}, "21", "21"),
        ({"teacher_prompt_template": "3{prompt}"}, "+1", "31"),
        ({"teacher_prompt_template": "3{prompt}", "system_prompt": "7"}, "+7+1", "31"),
        ({"prompt_template": "2{prompt}", "teacher_prompt_template": "3{prompt}"}, "21", "31"),
        ({"prompt_template": "2{prompt}", "teacher_prompt_template": "chat"}, "21", "=1"),
        ({"prompt_template": "2{prompt}", "teacher_prompt_template": "chat", "system_prompt": "7"}, "21", "=7=1"),
    ],
)
def test_the_teacher_reads_the_same_prompt_in_its_own_tokens(student, teacher, arguments, of_student, of_teacher):
    found = data(student, teacher, **arguments)
    assert student.decode(found[0][0]) == of_student
    assert teacher.decode(found.teacher_prompt(0)) == of_teacher
    longest = found.teacher_prompt(1)
    assert found.longest_teacher_prompt == len(longest) == len(of_teacher) + 1
    assert found.largest_teacher_token == max(*longest, *found.teacher_prompt(0))
    assert found.largest_token == max(*found[0][0], *found[1][0])


def test_a_prompt_is_dropped_for_both(student, teacher):
    found = data(student, teacher, ["1", "12", "", "123", "34"], prompt_template="{prompt}", max_prompt_tokens=2)
    assert [student.decode(found[i][0]) for i in range(len(found))] == ["1", "12", "34"]
    assert [teacher.decode(found.teacher_prompt(i)) for i in range(len(found))] == ["1", "12", "34"]
    assert (found.counts["empty"], found.counts["too_long"]) == (1, 1)
    silent = with_chat_that_says_nothing_to(teacher, "12")
    found = data(student, silent, ["1", "12", "34"], prompt_template="{prompt}", teacher_prompt_template="chat")
    assert (len(found), found.counts["empty"], found.counts["too_long"]) == (2, 1, 0)


def with_chat_that_says_nothing_to(teacher, prompt):
    teacher.chat_template = f"{{{{ '' if messages[0].content == '{prompt}' else messages[0].content }}}}"
    return teacher


def test_the_stream_gives_both(student, teacher):
    found = data(student, teacher, [str(i) for i in range(10)], prompt_template="{prompt}")
    step = PromptStream(found, prompts_per_step=4, seed=3).at_step(2)
    texts = [student.decode(tokens) for tokens in step.tokens]
    assert [teacher.decode(tokens) for tokens in step.teacher_tokens] == texts
    assert len(set(texts)) > 1


def test_without_another_tokenizer_there_is_one_reading():
    found = addition(tokenizer(), split="train", count=4)
    assert found.largest_teacher_token is found.longest_teacher_prompt is found.teacher_prompt(0) is None
    assert PromptStream(found, prompts_per_step=2, seed=0).at_step(0).teacher_tokens is None


def test_loaders_pass_the_teachers_tokenizer_on(tmp_path, student, teacher):
    found = addition(tokenizer(), split="train", count=4, teacher_tokenizer=teacher)
    assert teacher.decode(found.teacher_prompt(2)) == tokenizer().decode(found[2][0])
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"q": "1"}) + "\n")
    found = prompt_dataset(
        student, source=str(path), prompt_column="q", teacher_tokenizer=teacher, teacher_prompt_template="5{prompt}"
    )
    assert teacher.decode(found.teacher_prompt(0)) == "51"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_prompt_template": "Q"}, r"teacher_prompt_template is 'Q'; it must contain \{prompt\} or a column"),
        ({"teacher_prompt_template": ""}, "teacher_prompt_template is ''"),
        ({"prompt_template": "chat"}, r"dataset.prompt_template is 'chat'; it must contain \{prompt\}$"),
        ({"prompt_template": "{prompt}", "system_prompt": "7"}, "write it into prompt_template"),
        (
            {"prompt_template": "{prompt}", "teacher_prompt_template": "3{prompt}", "system_prompt": "7"},
            "write it into prompt_template",
        ),
        ({"teacher_prompt_template": [{"role": "user"}]}, "or a list of messages, each with `role` and `content`"),
        ({"teacher_prompt_template": []}, "or a list of messages"),
        (
            {"teacher_prompt_template": "{prompt}{hint}"},
            "row 0 has no hint, which dataset.teacher_prompt_template uses",
        ),
    ],
)
def test_mistakes_are_explained(student, teacher, arguments, message):
    with pytest.raises(ConfigError, match=message):
        data(
            student,
            **{"teacher": teacher} | {k.replace("teacher_tokenizer", "teacher"): v for k, v in arguments.items()},
        )
