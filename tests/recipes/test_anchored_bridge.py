"""An anchor and a reward beside a bridge to a teacher whose tokens are others: neither reads the teacher."""

import json

import pytest
import torch

from oprd_tune.run.launcher import run_recipe as launch
from tests.conftest import ENDED, SMALL, assert_same_student, load_config, recipe_class

CONSTANT = {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup", "checkpoint_every_n_steps": 1}
PARTS = {
    "recipe": "opd_topk_distributed",
    "loss._component_": "oprd_tune.losses.Composite",
    "loss.parts.bridge._component_": "oprd_tune.losses.BridgedMSE",
    "loss.parts.bridge.normalisation": "variance",
    "loss.parts.sft._component_": "oprd_tune.losses.ReferenceCrossEntropy",
    "loss.parts.reward._component_": "oprd_tune.losses.TaskReward",
    "loss.parts.reward.grader": "oprd_tune.grading.exact_match",
    "loss.weights.sft": 0.5,
    "reference_share": 0.25,
    "samples_per_prompt": 2,
    "bridge.prompts": 64,
    "bridge.held_out_prompts": 16,
}
TEENS = "tiny/cross_tokenizer"  # whose teacher reads 10 to 19 as one token each


def prepared(out, **overrides):
    cfg = load_config(TEENS, output_dir=out, **{**SMALL, **CONSTANT, **PARTS, **overrides})
    del cfg.loss["normalisation"]
    return recipe_class(cfg.recipe), cfg


def run(out, status=ENDED, **overrides):
    recipe, cfg = prepared(out, **overrides)
    assert launch(recipe, cfg) in status
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return [row for row in map(json.loads, lines) if "loss/total" in row]


def test_a_run_learns_from_all_three_and_resumes(tmp_path):
    rows = run(tmp_path / "whole")
    assert all(row["loss/bridge"] > 0 for row in rows)
    assert any(row["loss/sft"] > 0 for row in rows)
    assert any(row["loss/reward"] != 0 for row in rows)
    run(tmp_path / "parts", max_steps=2)
    run(tmp_path / "parts", resume="true")
    assert_same_student(tmp_path / "whole", tmp_path / "parts")


def test_the_anchor_is_the_cross_entropy_of_the_answers(tmp_path):
    """By hand, from a plain forward pass over the student's own tokens; the teacher's head is never there."""
    kind, cfg = prepared(tmp_path, reference_share=1.0)
    del cfg.loss.parts["reward"]
    recipe = kind(cfg)
    recipe.setup()
    (side,) = recipe.teachers
    assert not side.has_head
    prompts = recipe.data.prompts.at_step(0)
    rollout = recipe.data.references.beside(None, prompts, 0)
    model, head_VD = recipe.student.model, side.heads.student_VD
    losses = []
    with torch.no_grad():
        for row, length in enumerate(rollout.lengths_B.tolist()):
            tokens = rollout.tokens_BS[row : row + 1, :length]
            log_p_SV = (plain_states(model, tokens)[0] @ head_VD.T).log_softmax(-1)
            at = rollout.response_mask_BS[row, :length].nonzero().squeeze(1)
            losses.append(-log_p_SV[at - 1, tokens[0, at]])
    metrics = recipe.train_step(prompts).metrics.reduce(recipe.ranks)
    assert metrics["loss/sft"] == pytest.approx(0.5 * torch.cat(losses).mean().item(), rel=1e-5)
    assert metrics["loss/bridge"] > 0


def plain_states(model, tokens):
    found = []
    hook = model.norm.register_forward_hook(lambda _, __, out: found.append(out))
    model(tokens)
    hook.remove()
    return found[0]


def test_a_part_that_compares_tokens_is_refused(tmp_path, capsys):
    run(tmp_path, (2,), **{"loss.parts.kl._component_": "oprd_tune.losses.FullReverseKL"})
    said = capsys.readouterr().err
    assert "token losses compare them token by token" in said
    assert "ReferenceCrossEntropy and TaskReward read no teacher" in said


@pytest.mark.parametrize("diagnosed", [True, False])
def test_with_the_same_tokens_the_teachers_head_is_there_for_diagnoses_alone(tmp_path, diagnosed):
    cfg = load_config("tiny/oprd_plus_opd", output_dir=tmp_path, **SMALL, reference_share=0.5)
    cfg.loss.parts = {
        "oprd": {"_component_": "oprd_tune.losses.HiddenStateMSE", "normalisation": "rms"},
        "sft": {"_component_": "oprd_tune.losses.ReferenceCrossEntropy"},
    }
    cfg.loss.weights, cfg.diagnostics_every_n_steps = {"sft": 0.1}, 1 if diagnosed else None
    recipe = recipe_class(cfg.recipe)(cfg)
    recipe.setup()
    assert recipe.teachers[0].has_head is diagnosed
    metrics = recipe.train_step(recipe.data.prompts.at_step(0)).metrics.reduce(recipe.ranks)
    assert ("diagnostics/kl" in metrics) is diagnosed
    assert metrics["loss/oprd"] > 0
