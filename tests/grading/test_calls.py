"""Graders of a user's own: what is told of them, when, and what becomes of the run."""

import pytest
import torch

from oprd_tune.errors import ConfigError, RolloutError
from oprd_tune.grading.calls import find_grader, grade_all
from oprd_tune.run.launcher import run_recipe as launch
from tests.conftest import SMALL, load_config, recipe_class

HERE = "tests.grading.test_calls"


def whole_numbers(response, answer):
    return int(response) == int(answer)


def share(response, answer):
    return 0.5


def forgotten(response, answer):
    response == answer  # noqa: B015


def misspelt(response, answer):
    return respones == answer  # noqa: F821


def alone(response):
    return True


def array(response, answer):
    return torch.tensor(response == answer)


class Later:
    """Fails at a call of its own choice."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self, response, answer):
        self.left -= 1
        if self.left < 0:
            raise KeyError("boom")
        return response == answer


later = Later(0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("forgotten", "the grader forgotten gives None, which is no verdict; it must give True or False"),
        ("share", "the grader share gives 0.5, which is no verdict"),
        ("misspelt", "name 'respones' is not defined"),
        ("alone", "the grader alone takes other arguments; it must take (response, answer)"),
    ],
)
def test_what_is_no_grader_is_told_at_once(name, said):
    with pytest.raises(ConfigError) as error:
        find_grader("task_accuracy.grader", f"{HERE}.{name}")
    assert str(error.value).startswith(f"task_accuracy.grader: {said}")


def test_a_grader_need_not_know_the_answer_that_it_is_tried_on():
    assert grade_all(find_grader("grader", f"{HERE}.whole_numbers"), [("3", "3"), ("4", "3")]) == [True, False]
    assert grade_all(find_grader("grader", f"{HERE}.array"), [("a", "a"), ("b", "a")]) == [True, False]


def test_texts_on_which_a_grader_fails_are_shown():
    with pytest.raises(RolloutError, match="whole_numbers fails on the response 'x' with the answer '3': ValueError"):
        grade_all(whole_numbers, [("3", "3"), ("x", "3")])


@pytest.mark.parametrize("where", ["task_accuracy", "reward"])
def test_a_run_whose_grader_fails_keeps_what_is_done(tmp_path, capsys, monkeypatch, where):
    monkeypatch.setattr(later, "left", 10**9)
    cfg = load_config("tiny/oprd_plus_opd", output_dir=tmp_path, **SMALL, samples_per_prompt=2)
    if where == "reward":
        cfg.loss.parts.reward = {"_component_": "oprd_tune.losses.TaskReward", "grader": f"{HERE}.later"}
    else:
        cfg.task_accuracy.grader, cfg.evaluate_every_n_steps = f"{HERE}.later", 2
    cfg.log_samples_every_n_steps = 1000
    recipe = recipe_class(cfg.recipe)

    class FailsLater(recipe):
        def train_step(self, prompts):
            if self.run.step == 1:
                later.left = 3
            return super().train_step(prompts)

    assert launch(FailsLater, cfg) == 1
    said = capsys.readouterr().err
    assert "the grader Later fails on the response" in said
    assert "KeyError: 'boom'" in said
    assert "is saved" in said
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()]


class Batch:
    """Grades all at once."""

    def __init__(self, gives):
        self.gives = gives

    def __call__(self, response, answer):
        return response == answer

    def grade(self, pairs):
        return self.gives(pairs)


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (lambda pairs: [None] * len(pairs), "the grader Batch gives None, which is no verdict"),
        (lambda pairs: [True] * 5, "the grader Batch gives 5 verdicts on 1 responses"),
        (lambda pairs: 1 // 0, "the grader Batch fails: ZeroDivisionError"),
    ],
)
def test_a_grader_of_batches_is_held_to_the_same(gives, said):
    assert grade_all(Batch(lambda pairs: [True for _ in pairs]), [("1", "1")]) == [True]
    with pytest.raises(RolloutError, match=said):
        grade_all(Batch(gives), [("1", "1")])


def several(response, answer):
    return torch.tensor([True, False])


def test_an_array_is_no_verdict():
    with pytest.raises(RolloutError, match="which is no verdict"):
        grade_all(several, [("1", "1")])
