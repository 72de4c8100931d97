"""Shared fixtures: small random models, and recipes run in-process."""

import json
import os
import runpy
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of child processes too: tests run side by side, and models are tiny

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torchtune.models.qwen2 import qwen2

from oprd_tune.registry import config_files, recipe_files
from oprd_tune.run.launcher import FAILED

VOCAB, WIDTH, DEPTH = 23, 16, 3
ENDED = (0, FAILED)  # statuses of a run that went to its end: after a few steps, many students are worse


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_model(depth=DEPTH, *, tied=True, vocab=VOCAB, seed=0, build=qwen2, **kwargs):
    """A random Qwen2 with grouped heads and non-zero biases."""
    torch.manual_seed(seed)
    model = build(
        vocab_size=vocab,
        num_layers=depth,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=WIDTH,
        intermediate_dim=24,
        max_seq_len=64,
        rope_base=10_000.0,
        tie_word_embeddings=tied,
        **kwargs,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.tok_embeddings.weight.mul_(0.3)
    return model


@pytest.fixture
def model():
    return make_model()


def load_config(name, **overrides):
    """A shipped config with overrides, as a recipe receives it."""
    cfg = OmegaConf.load(config_files()[name])
    return OmegaConf.merge(cfg, OmegaConf.from_dotlist([f"{k}={v}" for k, v in overrides.items()]))


def load_recipe(name):
    """A recipe file's namespace."""
    return runpy.run_path(str(recipe_files()[name]), run_name="recipe")


def recipe_class(name):
    """The class that a recipe file defines."""
    (found,) = (v for v in load_recipe(name).values() if isinstance(v, type) and v.__module__ == "recipe")
    return found


SMALL = {"max_steps": 4, "prompts_per_step": 4, "eval_dataset.count": 20, "dataset.count": 64}


def run_recipe(name, config, output_dir, **overrides):
    """Run a recipe in-process; returns it after training."""
    cfg = load_config(config, output_dir=output_dir, **{**SMALL, **overrides})
    recipe = recipe_class(name)(cfg)
    recipe.setup()
    status = recipe.train()
    summary = Path(output_dir) / "summary.json"
    failed = summary.exists() and json.loads(summary.read_text())["failure"] is not None
    assert status == (FAILED if failed else 0)
    return recipe


@pytest.fixture(scope="module")
def process_group():
    """This process as the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def weights(folder):
    """The tensors of a Hugging Face folder by name."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_student(one, other):
    """Two runs ended with bitwise equal students."""
    a, b = weights(one / "final"), weights(other / "final")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
