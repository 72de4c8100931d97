"""A teacher that shares the student's tokens and reads more: what it reads, and where its states meet the student's."""

import json

import pytest
import torch

from oprd_tune.data import PromptDataset, PromptReader, PromptStream, prompt_dataset
from oprd_tune.data.templates import TeacherTemplate
from oprd_tune.errors import ConfigError
from oprd_tune.tiny import tokenizer
from tests.data.test_teacher_prompts import STUDENTS, with_chat
from tests.run.test_rollouts import rollout_of

ROWS = [{"prompt": "1+2=", "answer": "3", "steps": "12"}, {"prompt": "40+2=", "answer": "42", "steps": 402}]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{answer}={prompt}", ["3=1+2=", "42=40+2="]),
        ("{prompt}{steps}", ["1+2=12", "40+2=402"]),
        ("{prompt}{steps}{steps}+{answer}", ["1+2=1212+3", "40+2=402402+42"]),
        ("{prompt}", ["1+2=", "40+2="]),
    ],
)
def test_a_template_may_use_any_column(template, wanted):
    data = PromptDataset(ROWS, tokenizer(), prompt_template="{prompt}", teacher_prompt_template=template)
    assert [tokenizer().decode(data.teacher_prompt(i)) for i in range(2)] == wanted
    assert [tokenizer().decode(data[i][0]) for i in range(2)] == ["1+2=", "40+2="]
    assert data.longest_teacher_prompt == len(wanted[1])
    step = PromptStream(data, prompts_per_step=2, seed=0).at_step(0)
    assert sorted(map(len, step.teacher_tokens)) == sorted(map(len, wanted))


def test_braces_that_are_no_column_stay():
    filled = TeacherTemplate("\\boxed{} {prompt} {{answer}} {a b} \\frac{1}{{2}}").fill_all(["1"], [None], [{}])
    assert filled == ["\\boxed{} 1 {answer} {a b} \\frac{1}{{2}}"]


def test_a_column_may_have_any_name(capsys):
    rows = [{"prompt": "1+2=", "answer": "3", "Correct Answer": "7", "final-answer": "8"}]
    template = "{Correct Answer}{{Correct Answer}}{final-answer}\\text{not this}{Corect Answer}{1 2}{prompt}"
    filled = TeacherTemplate(template, rows[0])
    assert filled.columns == ["Correct Answer", "final-answer"]
    assert filled.untouched == ["{Corect Answer}"]
    wanted = "7{Correct Answer}8\\text{not this}{Corect Answer}{1 2}1+2="
    assert filled.fill_all(["1+2="], ["3"], rows) == [wanted]
    data = PromptDataset(
        rows, tokenizer(), prompt_template="{prompt}", teacher_prompt_template="{Correct Answer}{a b}{prompt}"
    )
    assert tokenizer().decode(data.teacher_prompt(0)) == "7 1+2="  # this tokenizer has no letters
    assert "{a b} is no column, and stays as it is" in capsys.readouterr().out


def test_a_column_may_hold_the_whole_prompt():
    chat = [{"role": "user", "content": "5"}, {"role": "assistant", "content": "6"}, {"role": "user", "content": "8"}]
    assert TeacherTemplate("{told}").fill_all(["1"], [None], [{"told": "9"}]) == ["9"]
    told = TeacherTemplate([{"role": "user", "content": "{told}"}]).fill_all([chat], [None], [{"told": "9"}])
    assert told == [[{"role": "user", "content": "9"}]]
    with pytest.raises(ConfigError, match="or a column that holds the whole prompt"):
        TeacherTemplate("{answer}")


def test_braces_with_a_number_are_no_column():
    assert TeacherTemplate("\\frac{1}{2} {prompt}").columns == []


def test_a_value_with_braces_is_not_filled_again():
    filled = TeacherTemplate("{prompt} {answer}").fill_all(["{answer}"], ["{prompt}"], [{}])
    assert filled == ["{answer} {prompt}"]


def test_chat_messages_around_a_chat(tmp_path):
    own = with_chat(tmp_path, STUDENTS)  # writes + before each message
    template = [{"role": "system", "content": "7"}, {"role": "user", "content": "{prompt}={answer}"}]
    several = [
        {"role": "user", "content": "5"},
        {"role": "assistant", "content": "6"},
        {"role": "user", "content": "8"},
    ]
    rows = [{"prompt": "1", "answer": "9"}, {"prompt": several, "answer": "4"}]
    data = PromptDataset(rows, own, teacher_prompt_template=template)
    assert [own.decode(data[i][0]) for i in range(2)] == ["+1", "+5+6+8"]
    assert [own.decode(data.teacher_prompt(i)) for i in range(2)] == ["+7+1=9", "+5+6+7+8=4"]


def test_columns_come_from_files(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"q": row["prompt"], "a": row["answer"], "more": row}) + "\n" for row in ROWS))
    given = {"source": str(path), "prompt_column": "q", "answer_column": "a", "prompt_template": "{prompt}"}
    data = prompt_dataset(tokenizer(), **given, teacher_prompt_template="{answer}{more.steps}{prompt}")
    assert [tokenizer().decode(data.teacher_prompt(i)) for i in range(2)] == ["3121+2=", "4240240+2="]
    spaced = path.with_name("spaced.jsonl")
    spaced.write_text(json.dumps({"q": "1+2=", "Correct Answer": "3"}) + "\n")
    data = prompt_dataset(
        tokenizer(),
        **{"source": str(spaced), "prompt_column": "q", "prompt_template": "{prompt}"},
        teacher_prompt_template="{Correct Answer}{prompt}",
    )
    assert tokenizer().decode(data.teacher_prompt(0)) == "31+2="
    with pytest.raises(ConfigError, match="has no column 'hint'"):
        prompt_dataset(tokenizer(), **given, teacher_prompt_template="{hint}{prompt}")


def test_an_answer_that_is_missing_is_named():
    rows = [*ROWS, {"prompt": "1+1=", "answer": None}]
    with pytest.raises(ConfigError, match="row 2 has no answer, .* uses; {answer} is .* from dataset.answer_column"):
        PromptDataset(rows, tokenizer(), prompt_template="{prompt}", teacher_prompt_template="{answer}{prompt}")


def test_states_meet_at_the_same_tokens_of_the_response():
    rollout = rollout_of((4, 7, 5), 0)  # a prompt of one token; responses of 5, 3 and 1
    prompts = [(8, 9, 8), (6,), (2, 2, 2, 2)]
    reading = PromptReader(0).read(rollout, prompts)
    for row, prompt in enumerate(prompts):
        length = int(rollout.lengths_B[row])
        response = rollout.tokens_BS[row, 1:length].tolist()
        assert reading.tokens_BU[row, : int(reading.lengths_B[row])].tolist() == [*prompt, *response]
        for column in range(rollout.tokens_BS.shape[1]):
            met = int(reading.column_BS[row, column])
            if column >= length:
                assert met == -1
            else:  # the prompt's last column, then each token
                assert met == len(prompt) - 1 + column
    assert torch.equal(PromptReader(0).read(rollout, [(3,)] * 3).tokens_BU, rollout.tokens_BS)
