"""A teacher that reads more than the student: losses against their formulas, and every recipe end to end."""

import json

import pytest
import torch

from oprd_tune.run.launcher import run_recipe as launch
from oprd_tune.torchtune_compat import set_output
from tests.conftest import ENDED, SMALL, assert_same_student, load_config, recipe_class

CONSTANT = {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup", "checkpoint_every_n_steps": 1}
ANSWER = {"dataset.teacher_prompt_template": "'{answer}={prompt}'"}
SAME = {"dataset.teacher_prompt_template": "'{prompt}'"}
RECIPES = ["tiny/opd_topk", "tiny/bridge_plus_opd"]
BRIDGE = {"bridge.prompts": 64, "bridge.held_out_prompts": 16}


def run(out, config, status=ENDED, **overrides):
    bridge = BRIDGE if "bridge" in config else {}
    cfg = load_config(config, output_dir=out, **{**SMALL, **CONSTANT, **bridge, **overrides})
    assert launch(recipe_class(cfg.recipe), cfg) in status
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] if 2 not in status else []


@pytest.mark.parametrize("config", RECIPES)
def test_the_same_prompt_gives_the_same_student(tmp_path, config):
    for name, extra in (("plain", {}), ("told", SAME)):
        run(tmp_path / name, config, **extra, max_steps=2)
    assert_same_student(tmp_path / "plain", tmp_path / "told")


def test_an_informed_teacher_teaches_something_else_and_the_run_resumes(tmp_path):
    config = "tiny/bridge_plus_opd"
    plain, told = (run(tmp_path / name, config, **extra) for name, extra in (("plain", {}), ("told", ANSWER)))
    losses = [[row["loss/total"] for row in rows if "loss/total" in row] for rows in (plain, told)]
    assert len(losses[0]) == len(losses[1]) == 4
    assert abs(losses[0][0] - losses[1][0]) > 1e-3 * losses[0][0]
    run(tmp_path / "parts", config, **ANSWER, max_steps=2)
    run(tmp_path / "parts", config, **ANSWER, resume="true")
    assert_same_student(tmp_path / "told", tmp_path / "parts")


def test_losses_are_those_of_each_row_read_alone(tmp_path):
    """Eq. 6 and the full KL, row by row, without padding, from both models' plain passes."""
    cfg = load_config("tiny/oprd_plus_opd", output_dir=tmp_path, **SMALL, **ANSWER)
    cfg.max_steps = 1
    recipe = recipe_class(cfg.recipe)(cfg)
    recipe.setup()
    prompts = recipe.data.prompts.at_step(0)
    sampled = recipe.engine.generate(prompts)
    recipe.engine.generate = lambda *_, **__: sampled
    with torch.no_grad():
        wanted = by_hand(recipe, prompts, sampled)
    metrics = recipe.train_step(prompts).metrics.reduce(recipe.ranks)
    assert metrics["token/kl"] == pytest.approx(wanted["kl"], rel=1e-5)
    for layer, error in wanted["mse"].items():
        assert metrics[f"layers/mse_{layer:02d}"] == pytest.approx(error, rel=1e-5)


def states_and_logits(model, head_VD, tokens):
    """The normed final state and each block's output of one row, and the logits of its head."""
    found = []
    hooks = [block.register_forward_hook(lambda _, __, out: found.append(out[0])) for block in model.layers]
    hooks.append(model.norm.register_forward_hook(lambda _, __, out: found.append(out[0])))
    output = model.output
    set_output(model, torch.nn.Identity())
    model(torch.tensor([tokens]))
    set_output(model, output)
    for hook in hooks:
        hook.remove()
    return [*found[:-2], found[-1]], found[-1] @ head_VD.T


def by_hand(recipe, prompts, sampled):
    teacher, heads = recipe.teachers[0].teacher._model, recipe.teachers[0].heads
    errors, kls = {pair.student: [] for pair in recipe.teachers[0].pairs}, []
    for row, position in enumerate(sampled.prompt_positions_B.tolist()):
        place = prompts.positions.index(position)
        prompt, told = prompts.tokens[place], prompts.teacher_tokens[place]
        assert len(told) > len(prompt)
        response = sampled.tokens_BS[row, len(prompt) : int(sampled.lengths_B[row])].tolist()
        own, own_logits = states_and_logits(recipe.student.model, heads.student_VD, [*prompt, *response])
        other, other_logits = states_and_logits(teacher, heads.teacher_VC, [*told, *response])
        here = slice(len(prompt) - 1, len(prompt) - 1 + len(response))
        there = slice(len(told) - 1, len(told) - 1 + len(response))
        for pair in recipe.teachers[0].pairs:
            h, g = own[pair.student - 1][here], other[pair.teacher - 1][there]
            errors[pair.student].append((h - g).square().mean(-1))
        log_p, log_q = own_logits[here].log_softmax(-1), other_logits[there].log_softmax(-1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return {"kl": torch.cat(kls).mean().item(), "mse": {n: torch.cat(e).mean().item() for n, e in errors.items()}}


def test_the_teachers_accuracy_is_that_of_what_it_reads(tmp_path):
    """Told the answer of each held-out sum by `eval_dataset`, in a form it has never seen, it answers otherwise."""
    accuracies = []
    for name, extra in (("plain", {}), ("told", {"eval_dataset.teacher_prompt_template": "'{answer}={prompt}'"})):
        run(tmp_path / name, "tiny/oprd", max_steps=1, **extra)
        accuracies.append(json.loads((tmp_path / name / "summary.json").read_text())["teacher"])
    assert accuracies[0] != accuracies[1]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"dataset.teacher_prompt_template": "'{solution}{prompt}'"}, "row 0 has no solution"),
        ({"dataset.teacher_prompt_template": "'" + "1" * 120 + "{prompt}'"}, "exceeds its context of"),
        (
            {"eval_dataset.teacher_prompt_template": "'" + "1" * 124 + "{prompt}'"},
            "the longest prompt of eval_dataset has 132 tokens as the teacher reads it",
        ),
        (
            {"dataset.teacher_prompt_template": "answer"},
            "it must contain {prompt} or a column that holds the whole prompt",
        ),
    ],
)
def test_what_cannot_be_read_is_told_before_weights_are(tmp_path, capsys, overrides, said):
    run(tmp_path / "out", "tiny/oprd", (2,), **overrides)
    assert said in capsys.readouterr().err
