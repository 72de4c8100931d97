"""One process needs nothing of torch.distributed, unless a setting needs FSDP2."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.conftest import SMALL, assert_same_student, load_config, recipe_class, run_recipe, weights

CONFIGS = {"oprd_distributed": "tiny/oprd", "opd_topk_distributed": "tiny/opd_topk"}
each_recipe = pytest.mark.parametrize(("recipe", "config"), CONFIGS.items())
GROUPS = ("init_process_group", "new_group")
COLLECTIVES = tuple(
    name
    for name in dir(dist)
    if callable(getattr(dist, name))
    and name.startswith(("all_", "broadcast", "reduce", "gather", "scatter", "barrier", "monitored", "send", "recv"))
)
MIXED = {"dtype": "bf16", "master_dtype": "fp32"}


@pytest.fixture
def alone(monkeypatch):
    """Whatever makes a group or communicates fails."""
    assert {"all_reduce", "all_gather", "all_gather_object", "barrier", "reduce_scatter_tensor"} <= set(COLLECTIVES)
    for recipe in CONFIGS:
        recipe_class(recipe)  # what it imports keeps the functions as they are
    for name in GROUPS + COLLECTIVES:
        for module in (dist, dist.distributed_c10d):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))


@pytest.fixture
def _group_removed():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def tensors(recipe):
    student, teacher = recipe.student, recipe.teachers[0].teacher._model
    moments = [value for state in student.optimizer.state.values() for value in state.values()]
    return [*student.model.parameters(), *teacher.parameters(), *moments]


def is_sharded(model):
    return any(isinstance(module, FSDPModule) for module in model.modules())


@each_recipe
def test_one_process_makes_no_group_shards_nothing_and_never_communicates(recipe, config, out, alone):
    """Checkpoints, evaluations and a resumed run included."""
    extra = {"teacher_placement": "sharded", "checkpoint_every_n_steps": 1, "evaluate_every_n_steps": 2}
    for steps in ({"max_steps": 2}, {"resume": "true"}):
        done = run_recipe(recipe, config, out, **extra, **steps)
        assert not dist.is_initialized()
        assert not is_sharded(done.student.model)
        assert not is_sharded(done.teachers[0].teacher._model)
        assert not any(isinstance(tensor, DTensor) for tensor in tensors(done))
    assert done.run.step == 4
    assert json.loads((out / "summary.json").read_text())["world_size"] == 1


@each_recipe
@pytest.mark.usefixtures("_group_removed")
def test_fp32_weights_of_a_bf16_student_are_sharded_and_learn(recipe, config, out):
    cfg = load_config(config, output_dir=out, **SMALL, **MIXED, evaluate_teacher="false")
    trainer = recipe_class(recipe)(cfg)
    trainer.setup()
    assert dist.get_world_size() == 1
    assert is_sharded(trainer.student.model)
    assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in trainer.student.model.parameters())
    assert not any(
        isinstance(p, DTensor) or p.dtype != torch.bfloat16 for p in trainer.teachers[0].teacher._model.parameters()
    )
    prompts = trainer.data.prompts.at_step(0)
    rollout = trainer.engine.generate(prompts)
    trainer.engine.generate = lambda *_, **__: rollout
    first, *_, last = (trainer.train_step(prompts).loss for _ in range(12))
    assert last < 0.5 * first


@pytest.mark.usefixtures("_group_removed")
def test_sharded_by_one_process_two_steps_and_two_more_are_four_bit_by_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    schedule = {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup"}  # max_steps shapes a cosine
    for folder, extra in ((whole, {}), (parts, {"max_steps": 2}), (parts, {"resume": "true"})):
        run_recipe("oprd_distributed", "tiny/oprd", folder, **MIXED, **schedule, **extra)
    assert_same_student(whole, parts)
    assert {weight.dtype for weight in weights(whole / "final").values()} == {torch.bfloat16}
