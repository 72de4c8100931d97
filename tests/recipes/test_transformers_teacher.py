"""Runs whose teacher transformers loads, end to end on the embedded student."""

import json
from pathlib import Path

import pytest

from oprd_tune import tiny
from oprd_tune.run.launcher import run_recipe as launch
from oprd_tune.tiny.model import MAX_SEQ_LEN, SYMBOLS, write_tokenizer
from tests.conftest import ENDED, SMALL, assert_same_student, load_config, recipe_class, run_recipe
from tests.teacher.transformers_models import save_model

SHAPE = {"vocab_size": len(SYMBOLS), "max_position_embeddings": MAX_SEQ_LEN}
SIZES = {"evaluate_every_n_steps": 2, "checkpoint_every_n_steps": 2, "task_accuracy.max_new_tokens": 4}
BRIDGED = {
    "bridge.rank": 8,
    "bridge.prompts": 32,
    "bridge.held_out_prompts": 8,
    "lr_scheduler._component_": "oprd_tune.training.constant_with_warmup",
}
TOKENS = {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup"}
# The recipe, its config, the teacher's family, and overrides.
RUNS = {
    "bridge from gemma3": ("oprd_distributed", "tiny/bridge", "gemma3", BRIDGED),
    "bridge from gemma2": ("oprd_distributed", "tiny/bridge", "gemma2", {**BRIDGED, "bridge.basis": "predictive"}),
    "full KL from llama": ("opd_topk_distributed", "tiny/opd_full", "llama", TOKENS),
}


def config(name, folder, out, **overrides):
    cfg = load_config(name, output_dir=out, **{**SMALL, **SIZES, **overrides})
    cfg.teacher_model = {"_component_": "oprd_tune.teacher.transformers_teacher", "path": str(folder)}
    files = {"_component_": "oprd_tune.teacher.transformers_files", "checkpoint_dir": str(folder)}
    cfg.teacher_checkpointer = files
    cfg.teacher, cfg.tokenizer = None, "tiny/student"
    return cfg


def run(recipe_name, config_name, folder, out, **overrides):
    recipe = recipe_class(recipe_name)(config(config_name, folder, out, **overrides))
    recipe.setup()
    assert recipe.train() in ENDED
    return recipe


@pytest.mark.parametrize("name", RUNS)
def test_a_student_learns_from_it_and_a_resumed_run_is_the_same(name, tmp_path, capsys):
    recipe_name, config_name, family, extra = RUNS[name]
    folder = tmp_path / "teacher"
    save_model(folder, family, **SHAPE)
    write_tokenizer(folder)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run(recipe_name, config_name, folder, whole, **extra)
    run(recipe_name, config_name, folder, parts, **extra, max_steps=2)
    run(recipe_name, config_name, folder, parts, **extra, resume="true")
    assert_same_student(whole, parts)
    summary = json.loads((whole / "summary.json").read_text())
    assert 0 <= summary["teacher"] <= 1
    assert done.run.journal.logged["loss/total"] > 0
    told = capsys.readouterr().out
    assert "3 blocks of width 32, vocabulary 16" in told


def test_our_own_teacher_and_transformers_of_one_folder_are_one_teacher(tmp_path):
    """The embedded teacher, loaded both ways: the losses and the accuracy agree."""
    folder = Path(tiny.__file__).parent / "teacher"
    ours = run_recipe("oprd_distributed", "tiny/oprd", tmp_path / "ours", **SIZES)
    theirs = run("oprd_distributed", "tiny/oprd", folder, tmp_path / "theirs")
    a, b = (r.run.journal for r in (ours, theirs))
    assert b.logged["loss/total"] == pytest.approx(a.logged["loss/total"], rel=1e-4)
    assert a.history.teacher_accuracy == b.history.teacher_accuracy > 0.5


def test_token_losses_refuse_a_scaled_head_before_anything_is_read(tmp_path, capsys):
    folder = tmp_path / "teacher"
    save_model(folder, "gemma2", **SHAPE)
    assert launch(recipe_class("opd_topk_distributed"), config("tiny/opd_full", folder, tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert "teacher_model: its logits are a product changed by final_logit_softcapping=30.0" in message


def test_a_scaled_head_is_not_compared_in_a_run_on_states(tmp_path, capsys):
    folder = tmp_path / "teacher"
    save_model(folder, "gemma2", **SHAPE)
    write_tokenizer(folder)
    changed = {"diagnostics_every_n_steps": 1, "max_steps": 1}
    logged = run("oprd_distributed", "tiny/bridge", folder, tmp_path / "out", **changed).run.journal.logged
    assert (
        "No diagnostics of next tokens, since the teacher's logits are a product changed by" in capsys.readouterr().out
    )
    assert logged["loss/total"] > 0
    assert not any(name.startswith("diagnostics") for name in logged)
