"""Composites of distillation with a task's reward and with cross-entropy on reference answers, end to end."""

import json

import pytest
import torch

from oprd_tune.evaluation.texts import decode_responses
from oprd_tune.run.launcher import run_recipe as launch
from tests.conftest import ENDED, SMALL, assert_same_student, load_config, recipe_class

CONSTANT = {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup", "checkpoint_every_n_steps": 1}
PARTS = {
    "loss._component_": "oprd_tune.losses.Composite",
    "loss.parts.opd._component_": "oprd_tune.losses.FullReverseKL",
    "loss.parts.reward._component_": "oprd_tune.losses.TaskReward",
    "loss.parts.reward.grader": "oprd_tune.grading.exact_match",
    "samples_per_prompt": 4,
}
ANCHOR = {"loss.parts.sft._component_": "oprd_tune.losses.ReferenceCrossEntropy", "reference_share": "[1,0,4]"}


def config(out, **overrides):
    return load_config("tiny/opd_full", output_dir=out, **{**SMALL, **CONSTANT, **PARTS, **overrides})


def run(out, status=ENDED, **overrides):
    cfg = config(out, **overrides)
    assert launch(recipe_class(cfg.recipe), cfg) in status
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] if 2 not in status else []


def test_all_parts_train_together_and_resume(tmp_path):
    """In the first step all prompts have their reference answer, so nothing is graded; in the last, none has."""
    rows = [row for row in run(tmp_path / "whole", **ANCHOR) if "loss/total" in row]
    assert [row["rollout/reference_share"] for row in rows[:1]] == [1]
    assert "rollout/reward" not in rows[0]
    assert rows[0]["loss/reward"] == 0
    assert rows[0]["loss/sft"] > 0
    assert rows[-1]["loss/sft"] == 0
    assert 0 <= rows[-1]["rollout/reward"] <= 1
    assert all(row["loss/opd"] > 0 for row in rows)
    run(tmp_path / "parts", **ANCHOR, max_steps=2)
    run(tmp_path / "parts", **ANCHOR, resume="true")
    assert_same_student(tmp_path / "whole", tmp_path / "parts")


def test_a_step_is_graded_as_by_hand(tmp_path):
    cfg = config(tmp_path)
    recipe = recipe_class(cfg.recipe)(cfg)
    recipe.setup()
    prompts = recipe.data.prompts.at_step(0)
    result = recipe.train_step(prompts)
    rollout = result.rollout
    texts = decode_responses(rollout.tokens_BS, rollout.response_mask_BS, recipe.data.tokenizer)
    answers = dict(zip(prompts.positions, prompts.answers, strict=True))
    right = [text == answers[place] for text, place in zip(texts, rollout.prompt_positions_B.tolist(), strict=True)]
    reward_GN = torch.tensor(right).float().view(-1, 4)
    assert 0 < reward_GN.mean() < 1
    wanted = (reward_GN - reward_GN.mean(1, keepdim=True)) / (reward_GN.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(rollout.advantage_B, wanted.flatten())
    assert result.metrics.reduce(recipe.ranks)["rollout/reward"] == pytest.approx(reward_GN.mean().item())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"samples_per_prompt": 1}, "samples_per_prompt is 1"),
        (
            {
                "loss.parts.more._component_": "oprd_tune.losses.TaskReward",
                "loss.parts.more.grader": PARTS["loss.parts.reward.grader"],
            },
            "one",
        ),
        ({"loss.parts.reward.grader": "oprd_tune.grading.nothing"}, "loss.grader"),
        ({"reference_share": 1.0}, "TaskReward grades samples, and reference_share is 1"),
        ({"loss.parts.sft._component_": "oprd_tune.losses.ReferenceCrossEntropy"}, "set reference_share"),
        ({"average_over": "rows"}, "average_over is 'rows'"),
    ],
)
def test_what_cannot_work_is_told_before_weights_are_read(tmp_path, capsys, overrides, said):
    run(tmp_path / "out", (2,), **overrides)
    assert said in capsys.readouterr().err
