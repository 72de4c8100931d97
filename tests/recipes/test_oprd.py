"""The recipe end to end on the tiny pair."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.registry import config_files
from oprd_tune.rollout import NativeEngine
from oprd_tune.run import Run
from oprd_tune.run.export import export_checkpoint
from oprd_tune.run.folder import RunFolder
from oprd_tune.run.launcher import run_recipe as launch
from oprd_tune.types import TeacherTargets
from tests.conftest import ENDED, SMALL, assert_same_student, load_config, recipe_class, run_recipe

NAME, CONFIG = "oprd_distributed", "tiny/oprd"


@pytest.mark.long
def test_the_student_approaches_its_teacher(out):
    overrides = {"max_steps": 60, "prompts_per_step": 64, "optimizer.lr": 4e-3, "dataset.count": 5000}
    recipe = run_recipe(NAME, CONFIG, out, **overrides, **{"eval_dataset.count": 400})
    summary = json.loads((out / "summary.json").read_text())
    assert summary["gap_closed"] > 0.35
    assert summary["perplexity_after"] < 0.85 * summary["perplexity_before"]
    assert summary["teacher"] > 0.99
    assert summary["steps"] == 60
    used = {"dataset": 5000, "eval_dataset": 400}
    assert summary["prompts"] == {
        name: {"used": count, "dropped": 0, "empty": 0, "too_long": 0, "unanswered": 0} for name, count in used.items()
    }
    history = recipe.run.journal.history
    first, last = (history.cosines[step] for step in (1, 60))
    assert all(after > before for before, after in zip(first, last, strict=True))


def test_the_name_for_one_device_means_the_same_recipe(tmp_path):
    further, schedule = "oprd_single_device", {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup"}
    run_recipe(NAME, CONFIG, tmp_path / "whole", **schedule)
    run_recipe(further, CONFIG, tmp_path / "parts", recipe=further, max_steps=2, **schedule)
    run_recipe(NAME, CONFIG, tmp_path / "parts", resume="true", **schedule)
    assert_same_student(tmp_path / "whole", tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())["recipe"] == NAME


def test_leaves_what_a_user_looks_for(out):
    run_recipe(NAME, CONFIG, out, **{"log_samples_every_n_steps": 2, "diagnostics_every_n_steps": 2})
    assert (out / "accuracy.png").exists()
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_00000004"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["tensors"])
    assert {"loss/total", "layers/cosine_04", "positions/cosine_quarter_1", "rollout/samples/text_summary"} <= tags
    assert {"time/rollout", "time/teacher", "time/student", "time/optimizer", "time/sync", "head/drift"} <= tags
    assert {"diagnostics/tokens/text_summary", "at_a_glance/kl_to_teacher"} <= tags
    assert {"layers/cosine", "layers/cosine_by_position"} <= set(events.Tags()["images"])
    samples = events.Tensors("rollout/samples/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "**reference answer**" in samples
    assert "**response, right**" in samples or "**response, wrong" in samples


def test_knows_how_far_next_tokens_are_from_the_teacher_s(tmp_path):
    """The same KL that a run with that loss sees on the same rollout, before the first update."""
    all_tokens = {"diagnostics_every_n_steps": 1, "diagnostics_tokens": 1000, "max_steps": 1}
    hidden = run_recipe(NAME, CONFIG, tmp_path / "hidden", **all_tokens).run.journal.logged
    token = run_recipe("opd_topk_distributed", "tiny/opd_full", tmp_path / "token", max_steps=1).run.journal.logged
    assert hidden["diagnostics/kl"] == pytest.approx(token["token/kl"], rel=1e-5)
    assert hidden["time/diagnosis"] > 0


def test_diagnoses_change_nothing_and_a_teacher_is_cut_without_them(tmp_path):
    runs = {}
    for every in (1, 3, "null"):
        out = tmp_path / str(every)
        runs[every] = run_recipe(NAME, CONFIG, out, diagnostics_every_n_steps=every, layers=[1, 2])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        diagnosed = [line["step"] for line in lines if "diagnostics/kl" in line]
        assert diagnosed == {1: [1, 2, 3, 4], 3: [3], "null": []}[every]
    for every in (3, "null"):
        assert_same_student(tmp_path / "1", tmp_path / str(every))
    depths = {every: len(recipe.teachers[0].teacher._model.layers) for every, recipe in runs.items()}
    assert depths == {1: 4, 3: 4, "null": 2}


def test_the_final_student_and_every_checkpoint_load_in_transformers(out, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = run_recipe(NAME, CONFIG, out)
    tokens = torch.tensor([[3, 4, 12, 5, 6, 13]])
    wanted = recipe.student.model(tokens)
    exported = export_checkpoint(str(out / "checkpoints" / "step_00000004"), str(tmp_path / "exported"))
    for folder in (out / "final", exported):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
        assert AutoTokenizer.from_pretrained(folder).decode([3, 12, 4]) == "1+2"
    assert not list(out.glob(".*"))


def test_two_steps_and_two_more_are_four_bit_by_bit(tmp_path):
    extra = {"loss.normalisation": "rms", "layers": "[1,3]"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    schedule = {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup"}  # max_steps shapes a cosine
    run_recipe(NAME, CONFIG, whole, **schedule, **extra)
    run_recipe(NAME, CONFIG, parts, max_steps=2, **schedule, **extra)
    run_recipe(NAME, CONFIG, parts, resume="true", **schedule, **extra)
    assert_same_student(whole, parts)


def test_an_optimizer_without_state_is_saved_and_resumed_too(tmp_path):
    sgd = {"optimizer._component_": "torch.optim.SGD", "optimizer.lr": 1e-2, "checkpoint_every_n_steps": 2}
    schedule = {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup"}
    run_recipe(NAME, CONFIG, tmp_path / "whole", **sgd, **schedule)
    run_recipe(NAME, CONFIG, tmp_path / "parts", **sgd, **schedule, max_steps=2)
    recipe = run_recipe(NAME, CONFIG, tmp_path / "parts", **sgd, **schedule, resume="true")
    assert recipe.run.checkpoint.name == "step_00000002"
    assert_same_student(tmp_path / "whole", tmp_path / "parts")


def test_sigterm_saves_and_the_run_goes_on_from_there(out, tmp_path):
    run_recipe(NAME, CONFIG, tmp_path / "whole")
    recipe = recipe_class(NAME)(load_config(CONFIG, output_dir=out, **SMALL))
    recipe.setup()
    step = recipe.train_step

    def step_and_signal(prompts):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(prompts)

    recipe.train_step = step_and_signal
    assert recipe.train() == 128 + signal.SIGTERM
    assert recipe.run.step == 1
    run_recipe(NAME, CONFIG, out, resume="true")
    assert_same_student(tmp_path / "whole", out)


def test_steps_that_are_not_finite_change_nothing_and_end_the_run(out, capsys):
    recipe = recipe_class(NAME)(load_config(CONFIG, output_dir=out, **SMALL))
    recipe.setup()
    before = [p.clone() for p in recipe.student.model.parameters()]
    recipe.teachers[0].teacher.targets = lambda tokens, index, packed: TeacherTargets(
        {n: torch.full((len(index), 128), torch.nan) for n in (1, 2, 3, 4)}
    )
    with pytest.raises(FloatingPointError, match="step 3"):
        recipe.train()
    assert all(torch.equal(a, b) for a, b in zip(before, recipe.student.model.parameters(), strict=True))
    history = recipe.run.journal.history
    assert (history.skipped_steps, history.not_finite_steps) == (2, 2)
    assert capsys.readouterr().err.count("step was not finite and skipped") == 1


def test_neither_microbatches_nor_checkpointing_change_the_course(tmp_path):
    losses = []
    variants = ({}, {"tokens_per_micro_batch": 20}, {"activation_checkpointing": "true"})
    for i, extra in enumerate(variants):
        recipe = run_recipe(NAME, CONFIG, tmp_path / str(i), **extra)
        losses.append(recipe.run.journal.logged["loss/total"])
    assert math.isclose(losses[1], losses[0], rel_tol=1e-5)
    assert losses[2] == losses[0]
    assert_same_student(tmp_path / "0", tmp_path / "2")


def test_truncated_responses_are_masked_or_dropped_alike(tmp_path):
    runs = {}
    for policy in ("keep", "mask", "drop"):
        extra = {"max_new_tokens": 2, "max_steps": 2, "prompts_per_step": 16, "truncated_responses": policy}
        runs[policy] = run_recipe(NAME, CONFIG, tmp_path / policy, **extra).run.journal.logged
    assert 0 < runs["keep"]["rollout/truncated_share"] < 1
    assert runs["mask"]["loss/total"] == pytest.approx(runs["drop"]["loss/total"], rel=1e-5)
    assert runs["mask"]["loss/total"] != pytest.approx(runs["keep"]["loss/total"], rel=1e-3)


def test_a_student_that_is_the_teacher_has_nothing_to_learn(out):
    recipe = run_recipe(NAME, CONFIG, out, max_steps=1, **{"student": "tiny/teacher"})
    assert recipe.run.journal.logged["loss/total"] == 0
    assert recipe.run.journal.logged["optimizer/grad_norm"] == 0


def test_layer_pairs_heal_a_student_of_other_depth(out):
    overrides = {
        "teacher_model._component_": "tests.recipes.models.deeper_tiny_qwen2",
        "teacher_checkpointer._component_": "tests.recipes.models.deeper_checkpointer",
        "teacher_checkpointer.name": str(out.parent),
        "teacher": "null",
        "layer_pairs": "[[1,1],[2,2],[4,5]]",
    }
    recipe = run_recipe(NAME, CONFIG, out, max_steps=2, **overrides)
    assert [(p.student, p.teacher) for p in recipe.teachers[0].pairs] == [(1, 1), (2, 2), (4, 5)]
    assert sorted(n for n in recipe.run.journal.logged if n.startswith("layers/mse")) == [
        f"layers/mse_0{i}" for i in (1, 2, 4)
    ]


def test_torchtunes_own_loggers_work(out):
    logger = {"metric_logger._component_": "torchtune.training.metric_logging.DiskLogger"}
    run_recipe(NAME, CONFIG, out, max_steps=1, **logger)
    (log,) = (out / "tensorboard").glob("log_*.txt")
    assert "loss/total" in log.read_text()


def test_bf16_and_compile_run(out, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    recipe = run_recipe(NAME, CONFIG, out, max_steps=2, dtype="bf16", compile="true")
    assert recipe.student.model.tok_embeddings.weight.dtype == torch.bfloat16
    assert 0 < recipe.run.journal.logged["loss/total"] < 10


@pytest.mark.parametrize("without", ["task_accuracy", "reference_perplexity"])
def test_an_answer_that_no_response_can_be_is_told(without, out, tmp_path, monkeypatch, capsys):
    """A tokenizer with more tokens than the smaller model."""
    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", lambda self: pytest.fail("a model was loaded"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1=", "answer": "2"}\n{"question": "2+9=", "answer": "11"}\n')
    data = {"_component_": "oprd_tune.data.prompt_dataset", "source": str(rows), "prompt_template": "{prompt}"}
    cfg = load_config(CONFIG, output_dir=out, **SMALL, **{without: "null"})
    cfg.tokenizer = {"_component_": "oprd_tune.tiny.tokenizer", "name": "teens_teacher"}
    cfg.dataset, cfg.eval_dataset = data, {**data, "answer_column": "answer"}
    assert launch(recipe_class(NAME), cfg) == 2
    assert (
        "the reference answer '11' has the token 17, but the models' vocabulary ends at 15" in capsys.readouterr().err
    )


BAD_INPUTS = {
    "unknown key": ({"max_step": 3}, "did you mean 'max_steps'"),
    "positions": ({"positions": "tail"}, "allowed are all, last, first_k, last_k"),
    "layers": ({"layers": "[1,9]"}, "has [9]; the student's layers count from 1 to 4"),
    "context": ({"max_new_tokens": 200}, "max_prompt_tokens + max_new_tokens = 216 exceeds the models' context of 128"),
    "other width": ({"teacher_model._component_": "tests.recipes.models.wider_tiny_qwen2"}, "need a bridge"),
    "other depth": ({"teacher_model._component_": "tests.recipes.models.deeper_tiny_qwen2"}, "give `layer_pairs`"),
    "missing folder": (
        {"checkpointer._component_": "tests.recipes.models.missing_checkpointer"},
        "checkpointer: the checkpoint folder is missing or incomplete",
    ),
    "damaged file": (
        {"checkpointer._component_": "tests.recipes.models.damaged_checkpointer"},
        "is damaged or incomplete",
    ),
    "another model's file": (
        {"checkpointer._component_": "tests.recipes.models.foreign_checkpointer"},
        "their files lack layers.3",
    ),
    "empty data": ({"max_prompt_tokens": 1}, "all 64 prompts are empty or longer than max_prompt_tokens 1"),
    "evaluation beyond the context": (
        {"task_accuracy.max_new_tokens": 200},
        "max_prompt_tokens + task_accuracy.max_new_tokens = 216 exceeds",
    ),
    "device": ({"device": "cuda" if not torch.cuda.is_available() else "xpu"}, "cannot be used"),
    "component's argument": ({"dataset.count": "many"}, "dataset.count is 'many'; it must be a whole number"),
    "no component": ({"dataset": "null"}, "the config lacks dataset"),
    "foreign tokenizer": ({"tokenizer._component_": "tests.recipes.models.foreign_tokenizer"}, "uses id 99"),
    "another architecture": (
        {"checkpointer._component_": "tests.recipes.models.qwen3_checkpointer"},
        "is not of the architecture Qwen2",
    ),
    "unusable output": ({"output_dir": "/proc/nowhere"}, "output_dir /proc/nowhere cannot be used"),
    "grader": ({"task_accuracy.grader": "nowhere.grade"}, "'nowhere.grade' cannot be found"),
    "evaluation without data": ({"eval_dataset._component_": "null"}, "needs an eval_dataset"),
    "checkpointing": ({"activation_checkpointing": 5}, "the student has 4 blocks, so none would be recomputed"),
    "normalisation": ({"loss.normalisation": "unit"}, "allowed are none, l2, rms"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_explained_before_a_model_is_loaded(case, out, monkeypatch, tmp_path, capsys):
    overrides, message = BAD_INPUTS[case]
    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", lambda self: pytest.fail("a model was loaded"))
    monkeypatch.setenv("TEST_FOLDER", str(tmp_path))
    cfg = load_config(CONFIG, **{"output_dir": out, **SMALL, **overrides})
    assert launch(recipe_class(NAME), cfg) == 2
    assert message in capsys.readouterr().err.rpartition("error: ")[2]
    assert not (out / "config.yaml").exists()


def test_a_token_loss_is_sent_to_its_recipe(out, capsys):
    cfg = load_config(CONFIG, output_dir=out, **SMALL)
    cfg.loss = {"_component_": "oprd_tune.losses.FullReverseKL"}
    assert launch(recipe_class(NAME), cfg) == 2
    assert "FullReverseKL is no loss on hidden states; opd_topk_distributed takes it" in capsys.readouterr().err


def test_an_output_folder_in_use_and_another_config_are_refused(out, capsys):
    run_recipe(NAME, CONFIG, out, max_steps=1)
    recipe = recipe_class(NAME)
    assert launch(recipe, load_config(CONFIG, output_dir=out, **SMALL)) == 2
    assert "holds another run; continue it with resume=true" in capsys.readouterr().err
    changed = load_config(CONFIG, output_dir=out, resume="true", **SMALL, **{"optimizer.lr": 0.5})
    assert launch(recipe, changed) == 2
    assert "optimizer.lr: 0.006 then, 0.5 now" in capsys.readouterr().err


def test_the_engine_is_closed_if_the_first_evaluation_fails(out, monkeypatch):
    def fail(_):
        raise RuntimeError("the evaluation failed")

    closed = []
    monkeypatch.setattr(Run, "_evaluate", fail)
    monkeypatch.setattr(NativeEngine, "close", lambda self: closed.append(self))
    with pytest.raises(RuntimeError, match="the evaluation failed"):
        run_recipe(NAME, CONFIG, out, max_steps=1)
    assert len(closed) == 1


DRIVER = """
import os, runpy, signal, sys
import torch

saves = 0
save = torch.save


def save_or_die(*args, **kwargs):
    global saves
    saves += str(getattr(args[1], "name", "")).endswith("state.pt")
    if saves == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # in the middle of the second checkpoint
    save(*args, **kwargs)


if "--die" in sys.argv:
    sys.argv.remove("--die")
    torch.save = save_or_die
sys.argv = ["recipe", *sys.argv[1:]]
runpy.run_path({recipe!r}, run_name="__main__")
"""


@pytest.mark.long
def test_a_run_killed_in_the_middle_of_a_save_ends_with_the_same_student(tmp_path):
    from oprd_tune.registry import recipe_files

    driver = tmp_path / "driver.py"
    driver.write_text(textwrap.dedent(DRIVER.format(recipe=str(recipe_files()[NAME]))))

    def run(folder, *extra):
        overrides = {**SMALL, "max_steps": 6, "checkpoint_every_n_steps": 2, "evaluate_every_n_steps": 3}
        overrides["optimizer.lr"] = 1e-4
        words = [f"{key}={value}" for key, value in overrides.items()]
        command = [sys.executable, str(driver), "--config", str(config_files()[CONFIG]), f"output_dir={folder}"]
        return subprocess.run([*command, *words, *extra], capture_output=True, text=True, check=False)

    assert run(tmp_path / "whole").returncode == 0
    killed = run(tmp_path / "killed", "--die")
    assert killed.returncode == -9
    assert (tmp_path / "killed" / "checkpoints" / ".staged-step_00000004").exists()
    resumed = run(tmp_path / "killed", "resume=true")
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming after step 2" in resumed.stdout
    assert_same_student(tmp_path / "whole", tmp_path / "killed")


def test_when_the_final_student_appears_its_checkpoint_is_there(out, monkeypatch):
    """A run that is killed then could not go on beside `final` alone."""
    export, found = RunFolder.export, []

    def look(self, name, *args, **kwargs):
        found.append((name, sorted(entry.name for entry in (out / "checkpoints").iterdir())))
        return export(self, name, *args, **kwargs)

    monkeypatch.setattr(RunFolder, "export", look)
    run_recipe(NAME, CONFIG, out)
    assert found[-1] == ("final", ["step_00000004"])


def test_the_error_of_quantisation_is_logged_once_in_a_run(out):
    quantised = {"teacher_quantization": "int8_weight_only", "log_every_n_steps": 2}
    schedule = {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup"}
    run_recipe(NAME, CONFIG, out, **quantised, **schedule)
    run_recipe(NAME, CONFIG, out, **quantised, **schedule, max_steps=6, resume="true")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "teacher/quantization_error_04" in line] == [2]


@pytest.mark.slow
def test_closes_95_percent_of_the_gap_in_200_steps(tmp_path):
    recipe = recipe_class(NAME)(load_config(CONFIG, output_dir=tmp_path, evaluate_every_n_steps=200))
    recipe.setup()
    assert recipe.train() in ENDED
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] <= 200
    assert summary["gap_closed"] >= 0.95
