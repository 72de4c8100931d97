"""Configs for large models: their components exist, and shape-true rehearsals of them run in the predicted memory."""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from oprd_tune.config import OPRDSettings, resolve
from oprd_tune.modeling.weights import build_on_meta
from oprd_tune.registry import config_files, recipe_named_in
from tests.conftest import load_config
from tests.rehearsal import prepare, with_folders

TRAINING = [name for name, path in config_files().items() if recipe_named_in(path) != "math_eval"]


@pytest.mark.parametrize("name", TRAINING)
def test_every_component_can_be_constructed(name, tmp_path):
    """Models on the meta device; what reads files is constructed by rehearsals and by the tiny runs."""
    cfg = with_folders(load_config(name, output_dir=tmp_path), tmp_path)
    settings = OPRDSettings
    settings, parts = resolve(cfg, settings, recipe=cfg.recipe)
    student, teacher = build_on_meta(parts.model), build_on_meta(parts.teacher_model)
    assert student.tok_embeddings.weight.is_meta
    assert len(student.layers) <= len(teacher.layers)
    assert Path(parts.tokenizer.arguments["path"]).is_dir()
    parts.loss()
    optimizer = parts.optimizer([torch.nn.Parameter(torch.zeros(2))])
    parts.lr_scheduler(optimizer, num_training_steps=settings.max_steps)
    parts.metric_logger()
    for engine in ("NativeEngine", "VLLMColocated"):  # `auto` takes one of them, with the same arguments
        assert hasattr(parts.with_rollout(f"oprd_tune.rollout.{engine}").rollout(), "generate")


@pytest.mark.long
def test_a_shape_true_rehearsal_runs_within_the_predicted_memory():
    """The largest config. Others take as long and pass too, by hand: python -m tests.rehearsal CONFIG FOLDER"""
    name = "qwen2_5_7b_to_1_5b"
    with tempfile.TemporaryDirectory() as folder:  # gigabytes, which pytest's own folders would keep for three runs
        command = [sys.executable, "-m", "tests.rehearsal", name, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["status"] == 0
    assert math.isfinite(result["loss"])
    assert result["loss"] > 0
    assert 0 < result["grad_norm"] < math.inf
    assert result["predicted_bytes"] == pytest.approx(result["measured_bytes"], rel=0.15)


@pytest.mark.long
def test_two_ranks_take_what_is_predicted_for_two():
    name, config = "tests.rehearsal", "qwen2_5_0_5b_to_0_5b"
    with tempfile.TemporaryDirectory() as folder:
        prepare(config, Path(folder), [])
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", name]
        done = subprocess.run([*launch, config, folder, "num_threads=1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["predicted_bytes"] == pytest.approx(result["measured_bytes"], rel=0.15)
