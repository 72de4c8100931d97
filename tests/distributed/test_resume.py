"""Runs that stop and go on: on the same number of ranks bit by bit, on another number with the same prompts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from oprd_tune.registry import config_files, recipe_files
from oprd_tune.run.export import export_checkpoint
from tests.conftest import ENDED, SMALL, assert_same_student, load_config, recipe_class, weights
from tests.distributed.spawn import run_ranks

NAME, CONFIG = "oprd_distributed", "tiny/oprd"
STEADY = {
    **SMALL,
    "teacher_placement": "sharded",
    "checkpoint_every_n_steps": 2,
    "evaluate_every_n_steps": 2,
    "lr_scheduler._component_": "oprd_tune.training.constant_with_warmup",  # max_steps shapes a cosine
    "loss.normalisation": "rms",
    "metric_logger._component_": "tests.distributed.components.JSONLogger",
}
MIXED = {
    "lora.use_dora": "true",
    "dtype": "bf16",
    "master_dtype": "fp32",
}
DROPOUT = {
    "lora.dropout": 0.2,
    "activation_checkpointing": "true",
}
FOLLOWED = {"teacher": "student", "teacher_weights.ema": 0.5, "dataset.teacher_prompt_template": "'{answer}={prompt}'"}
STUDENTS = {"full": {}, "lora with dropout": DROPOUT, "followed by its teacher": FOLLOWED}


def run(rank, folder, overrides):
    cfg = load_config(CONFIG, output_dir=folder, **{**STEADY, **overrides})
    recipe = recipe_class(NAME)(cfg)
    recipe.setup()
    assert recipe.train() in ENDED


def run_all(rank, folder):
    for name, extra in STUDENTS.items():
        run(rank, folder / name, extra)
        run(rank, folder / f"{name} in parts", {**extra, "max_steps": 2})
        run(rank, folder / f"{name} in parts", {**extra, "resume": "true"})
    run(rank, folder / "more", {"max_steps": 2})
    run(rank, folder / "bf16 with fp32 adapters", MIXED)


def resume(rank, folder):
    run(rank, folder, {"resume": "true"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    run_ranks(run_all, 2, folder / "two", folder)
    run_ranks(run, 1, folder / "one", folder / "fewer", {"max_steps": 2})
    run_ranks(resume, 1, folder / "two to one", folder / "more")
    run_ranks(resume, 2, folder / "one to two", folder / "fewer")
    return folder


@pytest.mark.parametrize("name", STUDENTS)
def test_two_steps_and_two_more_are_four_bit_by_bit(folder, name):
    assert_same_student(folder / name, folder / f"{name} in parts")


@pytest.mark.parametrize("name", ["more", "fewer"])
def test_another_number_of_ranks_goes_on_with_the_same_prompts(folder, name):
    whole, resumed = (
        [json.loads(line) for line in (folder / run / "tensorboard" / "log.jsonl").read_text().splitlines()]
        for run in ("full", name)
    )
    losses = [
        {line["step"]: line["loss/total"] for line in lines if "loss/total" in line} for lines in (whole, resumed)
    ]
    assert losses[0].keys() == losses[1].keys() == {1, 2, 3, 4}
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # rounding of two ranks, amplified by Adam
    a, b = weights(folder / "full" / "final"), weights(folder / name / "final")
    assert all(torch.allclose(a[key], b[key], atol=2e-3) for key in a)


def test_a_checkpoint_of_two_ranks_becomes_a_hugging_face_folder(folder, tmp_path):
    for name in ("full", "lora with dropout", "bf16 with fp32 adapters"):
        exported = export_checkpoint(str(folder / name / "checkpoints" / "step_00000004"), str(tmp_path / name))
        a, b = weights(exported), weights(folder / name / "final")
        common = a.keys() & b.keys()
        assert len(common) > 30
        assert all(torch.equal(a[key], b[key]) for key in common)


def test_the_final_student_loads_in_transformers(folder):
    from transformers import AutoModelForCausalLM

    for name in ("full", "lora with dropout"):
        model = AutoModelForCausalLM.from_pretrained(folder / name / "final", dtype=torch.float32)
        written = weights(folder / name / "final")
        assert torch.equal(model.model.norm.weight, written["model.norm.weight"])
        assert model(torch.tensor([[3, 4, 12, 5, 13]])).logits.isfinite().all()


def test_only_what_trains_is_saved(folder):
    size = sum(f.stat().st_size for f in (folder / "lora with dropout" / "checkpoints" / "step_00000004").iterdir())
    whole = sum(f.stat().st_size for f in (folder / "full" / "checkpoints" / "step_00000004").iterdir())
    assert size < whole / 2
    assert not list(folder.rglob(".staged*"))


def command(ranks, folder, *extra):
    overrides = {**SMALL, "max_steps": 100_000, "evaluate_every_n_steps": 100_000, "checkpoint_every_n_steps": 20}
    overrides["teacher_placement"] = "sharded"
    words = [f"{key}={value}" for key, value in overrides.items()]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"),
        *(str(recipe_files()[NAME]), "--config", str(config_files()[CONFIG]), f"output_dir={folder}", *words, *extra),
    ]


def wait_for_checkpoint(folder, process, seconds=120):
    end = time.monotonic() + seconds
    while not list((folder / "checkpoints").glob("step_*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.2)


def children(pid):
    stats = {int(path.parent.name): path.read_text() for path in Path("/proc").glob("[0-9]*/stat")}
    return [child for child, stat in sorted(stats.items()) if int(stat.rpartition(")")[2].split()[1]) == pid]


def test_a_killed_rank_ends_the_job_and_a_signal_saves_it(out):
    process = subprocess.Popen(command(2, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_checkpoint(out, process)
    victim = children(process.pid)[1]
    os.kill(victim, signal.SIGKILL)
    started = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - started < 20
    assert process.returncode != 0
    assert re.search(rf"SIGKILL\) received by PID {victim}", output)
    reached = max((out / "checkpoints").glob("step_*")).name

    process = subprocess.Popen(
        command(2, out, "resume=true"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while max((out / "checkpoints").glob("step_*")).name == reached:
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert f"Resuming after step {int(reached[5:])}" in output
    stopped = re.search(r"Stopped after step (\d+); everything is saved", output)
    assert stopped, output
    assert (out / "checkpoints" / f"step_{int(stopped[1]):08d}").exists()
