"""Several teachers, each of which reads its own prompts: losses against their formulas, and whole runs."""

import json
from pathlib import Path

import pytest
import torch

from oprd_tune.metrics.names import is_described
from oprd_tune.run.launcher import run_recipe as launch
from tests.conftest import ENDED, SMALL, assert_same_student, load_config, recipe_class
from tests.recipes.test_privileged_teacher import states_and_logits

TWO = {"dataset._component_": "oprd_tune.tiny.two_tasks", "eval_dataset._component_": "oprd_tune.tiny.two_tasks"}
TEACHERS = {"teacher": "null", "teachers.addition": "tiny/teacher", "teachers.reversal": "tiny/reversing_teacher"}
CONSTANT = {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup"}


def run(out, config="tiny/two_teachers", status=ENDED, **overrides):
    cfg = load_config(config, output_dir=out, **{**SMALL, **CONSTANT, **overrides})
    assert launch(recipe_class(cfg.recipe), cfg) in status
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] if 2 not in status else []


@pytest.mark.slow
def test_the_student_learns_both_tasks_but_not_from_teachers_that_read_the_other_ones_prompts(tmp_path):
    found = {}
    for shuffled in ("false", "true"):
        cfg = load_config("tiny/two_teachers", output_dir=tmp_path / shuffled, **{"eval_dataset.count": 600})
        cfg = load_config(
            "tiny/two_teachers",
            output_dir=tmp_path / shuffled,
            **{"max_steps": 100, "eval_dataset.count": 600, "dataset.shuffled": shuffled},
        )
        assert launch(recipe_class(cfg.recipe), cfg) in ENDED
        found[shuffled] = json.loads((tmp_path / shuffled / "summary.json").read_text())["by_teacher"]
    assert found["false"]["addition"]["teacher"] > 0.97
    assert found["false"]["reversal"]["teacher"] > 0.97
    assert found["false"]["addition"]["after"] > 0.6
    assert found["false"]["reversal"]["after"] > 0.8
    assert max(task["after"] for task in found["true"].values()) < 0.4


def test_losses_are_those_of_each_row_read_alone_by_its_teacher(tmp_path):
    """Eq. 6 and the full KL, row by row, without padding; parts and teachers add up."""
    overrides = {**SMALL, **TWO, **TEACHERS, "max_steps": 1, "prompts_per_step": 8}
    cfg = load_config("tiny/oprd_plus_opd", output_dir=tmp_path, **overrides)
    recipe = recipe_class(cfg.recipe)(cfg)
    recipe.setup()
    prompts = recipe.data.prompts.at_step(0)
    sampled = recipe.engine.generate(prompts)
    recipe.engine.generate = lambda *_, **__: sampled
    with torch.no_grad():
        rows = [by_hand(recipe, prompts, sampled, row) for row in range(len(sampled))]
    metrics = recipe.train_step(prompts).metrics.reduce(recipe.ranks)
    names = ["addition", "reversal"]
    assert {name for name, _, _ in rows} == {*names}
    everything = torch.cat([kl_T for _, kl_T, _ in rows])
    assert metrics["token/kl"] == pytest.approx(everything.mean().item(), rel=1e-5)
    total = 0.0
    for name in names:
        kl_T = torch.cat([kl_T for whose, kl_T, _ in rows if whose == name])
        error_T = torch.cat([error_T for whose, _, error_T in rows if whose == name])
        assert metrics[f"teachers/{name}/token/kl"] == pytest.approx(kl_T.mean().item(), rel=1e-5)
        weights = recipe.loss.weights
        share = (weights["opd"] * kl_T.sum() + weights["oprd"] * error_T.sum()).item() / len(everything)
        assert metrics[f"teachers/{name}/loss"] == pytest.approx(share, rel=1e-5)
        total += share
    assert metrics["loss/total"] == pytest.approx(total, rel=1e-5)
    assert all(map(is_described, metrics))


def by_hand(recipe, prompts, sampled, row):
    """The teacher's name, the KL and the mean error over its layers at each token of a row."""
    place = prompts.positions.index(int(sampled.prompt_positions_B[row]))
    (side,) = (teacher for teacher in recipe.teachers if teacher.name == prompts.teachers[place])
    tokens, start = sampled.tokens_BS[row, : int(sampled.lengths_B[row])].tolist(), len(prompts.tokens[place])
    own, own_logits = states_and_logits(recipe.student.model, side.heads.student_VD, tokens)
    other, other_logits = states_and_logits(side.teacher._model, side.heads.teacher_VC, tokens)
    here = slice(start - 1, len(tokens) - 1)
    errors = [(own[p.student - 1][here] - other[p.teacher - 1][here]).square().mean(-1) for p in side.pairs]
    log_p, log_q = own_logits[here].log_softmax(-1), other_logits[here].log_softmax(-1)
    return side.name, (log_p.exp() * (log_p - log_q)).sum(-1), torch.stack(errors).mean(0)


UNALIKE = {
    **TWO,
    **{"teacher": "null", "teacher_model": "null", "teacher_checkpointer": "null", "teacher_tokenizer": "null"},
    **{"teachers.addition.teacher": "tiny/teens_teacher", "teachers.addition.teacher_placement": "offloaded"},
    **{"teachers.addition.bridge.rank": 8, "teachers.reversal.teacher": "tiny/reversing_teacher"},
    **{"teachers.reversal.bridge.rank": 16, "checkpoint_every_n_steps": 1},
    **{"bridge.prompts": 16, "bridge.held_out_prompts": 16},
}


def test_each_may_have_its_own_tokens_bridge_and_place_and_the_run_resumes(tmp_path, capsys):
    config = "tiny/cross_tokenizer"
    rows = run(tmp_path / "whole", config, **UNALIKE)
    said = capsys.readouterr().out
    assert "bridge addition   4 layer pairs, 128 against 192 wide, rank 8" in said
    assert "bridge reversal   4 layer pairs, 128 against 128 wide, rank 16" in said
    trained = [row for row in rows if "loss/total" in row]
    assert len(trained) == 4
    assert any(0.3 < row["rollout/matched_share"] < 1 for row in trained)
    for name in ("addition", "reversal"):
        assert (tmp_path / "whole" / f"bridge_{name}.safetensors").is_file()
    run(tmp_path / "parts", config, **UNALIKE, max_steps=2)
    run(tmp_path / "parts", config, **UNALIKE, resume="true")
    assert_same_student(tmp_path / "whole", tmp_path / "parts")


def test_one_that_reads_nothing_in_a_step_does_not_run(tmp_path):
    cfg = load_config("tiny/two_teachers", output_dir=tmp_path, **SMALL)
    recipe = recipe_class(cfg.recipe)(cfg)
    recipe.setup()
    prompts = recipe.data.prompts.at_step(0)
    additions = [p for p, name in zip(prompts.positions, prompts.teachers, strict=True) if name == "addition"]
    assert 0 < len(additions) < len(prompts)
    ran = []
    for side in recipe.teachers:
        targets = side.teacher.targets
        side.teacher.targets = lambda *asked, _of=(side.name, targets): ran.append(_of[0]) or _of[1](*asked)
    result = recipe.train_step(prompts.among(additions))
    assert ran == ["addition"]
    assert result.loss > 0


def test_rms_is_measured_on_all_teachers_and_quantised_ones_are_told_apart(tmp_path, capsys):
    overrides = {"loss.normalisation": "rms", "teachers.reversal.teacher": "tiny/reversing_teacher"}
    cfg = load_config("tiny/two_teachers", output_dir=tmp_path)
    del cfg.teachers.reversal
    small = {**SMALL, "max_steps": 1, "teachers.reversal.teacher_quantization": "int8_weight_only"}
    for key, value in {**small, **overrides}.items():
        from omegaconf import OmegaConf

        OmegaConf.update(cfg, key, value, force_add=True)
    assert launch(recipe_class(cfg.recipe), cfg) in ENDED
    assert "Quantised teacher reversal: relative error" in capsys.readouterr().out
    summary = json.loads((Path(tmp_path) / "summary.json").read_text())
    assert list(summary["teacher_errors"]) == ["reversal"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"teacher": "tiny/teacher"}, "teacher has no effect beside `teachers`"),
        ({"teachers.addition": "tiny/none"}, "teachers.addition: teacher"),
        ({"teachers.third": "tiny/teacher"}, "teachers.third: it reads no prompt of `dataset`"),
        ({"teachers.a-b": "tiny/teacher"}, "teachers has the name 'a-b'; allowed are letters, digits and _"),
        ({"teachers": "tiny/teacher"}, "teachers is 'tiny/teacher'; give names, each with a teacher"),
        ({"teachers.reversal": 3}, "teachers.reversal is 3; give a model folder"),
        ({"teachers.third.placement": "offloaded"}, "has no key 'placement'; did you mean 'teacher_placement'?"),
        ({"teachers.third.prompts": "[addition]"}, "teachers.third lacks `teacher`"),
        ({"dataset._component_": "oprd_tune.tiny.addition"}, "does not say who reads a prompt"),
        ({"eval.benchmarks.a.source": "x.jsonl", "eval.teacher": "true"}, "eval"),
    ],
)
def test_mistakes_are_told_before_weights_are_read(tmp_path, capsys, overrides, said):
    run(tmp_path / "out", status=(2,), **overrides)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"teacher_weights": "live"}, "teachers.third: teacher_weights is live, which is for a student that"),
        ({"min_matched_share": "many"}, "teachers.third: min_matched_share is 'many'; it must be float"),
        ({"prompts": "addition"}, "teachers.third.prompts is 'addition'; give a list"),
        ({"prompts": ["addition"]}, "both teachers.addition and teachers.third read the prompts 'addition'"),
        ({"layers": [9]}, "teachers.third has no key 'layers'"),
        (
            {"layer_pairs": [[1, 1], [4, 4]]},
            "teachers.third is paired with the student's layers [1, 4], and",
        ),
        ({"teacher": "tiny/wide_teacher"}, "teachers.third: the student is 128 wide and the teacher 192"),
    ],
)
def test_mistakes_in_an_entry_name_it(tmp_path, capsys, entry, said):
    cfg = load_config("tiny/two_teachers", output_dir=tmp_path / "out", **SMALL)
    cfg.teachers.third = {"teacher": "tiny/teacher", **entry}
    assert launch(recipe_class(cfg.recipe), cfg) == 2
    assert said in capsys.readouterr().err
