"""An optimizer or a schedule that would fail in a run fails before it."""

import pytest
import torch

from oprd_tune.config import Component
from oprd_tune.errors import ConfigError
from oprd_tune.preflight.trial import try_optimizer


class ClosureLover(torch.optim.SGD):
    """An optimizer that asks for a closure."""

    def step(self, closure):
        return super().step(closure)


def no_optimizer(params):
    return "Adam"


def falling_below_zero(optimizer, num_training_steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step)


def attempt(optimizer, schedule=None, *, dtype=torch.float32):
    parts = [
        None if section is None else Component.find(name, section)
        for name, section in (("optimizer", optimizer), ("lr_scheduler", schedule))
    ]
    return try_optimizer(*parts, max_steps=10, dtype=dtype, device=torch.device("cpu"))


ADAM, SGD = {"_component_": "torch.optim.AdamW"}, {"_component_": "torch.optim.SGD", "lr": 0.1}


@pytest.mark.parametrize(
    ("optimizer", "dtype", "expected"),
    [
        (ADAM, torch.float32, 8),
        (ADAM, torch.bfloat16, 4),
        (ADAM | {"fused": True}, torch.float32, 8),
        (SGD, torch.float32, 0),
        (SGD | {"momentum": 0.9}, torch.float32, 4),
        ({"_component_": "torch.optim.Adagrad"}, torch.float32, 4),
    ],
)
def test_optimizers_are_asked_for_what_they_keep(optimizer, dtype, expected):
    assert attempt(optimizer, dtype=dtype) == expected


@pytest.mark.parametrize(
    "schedule",
    [
        {"_component_": "oprd_tune.training.cosine_with_warmup", "warmup_steps": 2},
        {"_component_": "oprd_tune.training.constant_with_warmup"},
        {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 1},
    ],
)
def test_usual_schedules_pass_and_change_no_random_numbers(schedule):
    before = torch.get_rng_state()
    assert attempt(ADAM, schedule) == 8
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("optimizer", "schedule", "message"),
    [
        ({"_component_": "torchao.optim.AdamW8bit"}, None, "AdamW8bit cannot be saved in a checkpoint"),
        (
            {"_component_": f"{__name__}.ClosureLover", "lr": 0.1},
            None,
            "takes no step as runs do it, without a closure",
        ),
        ({"_component_": f"{__name__}.no_optimizer"}, None, "gives a str, which is no torch.optim.Optimizer"),
        ({"_component_": "torch.optim.LBFGS"}, None, "optimizer: torch.optim.LBFGS cannot be|takes no step"),
        (ADAM | {"lr": float("inf")}, None, "turn a weight of 1, with a gradient of 0.01, into (nan|inf)"),
        (ADAM | {"lr": 1e9}, None, "into 1.01e.09; lower lr or weight_decay"),
        (SGD | {"weight_decay": 1e9}, None, "lower lr or weight_decay"),
        (ADAM | {"lr": -1}, None, "Invalid learning rate: -1"),
        (ADAM | {"betas": [0.9, 1.5]}, None, "Invalid beta parameter at index 1"),
        (ADAM, {"_component_": f"{__name__}.falling_below_zero"}, "gives the learning rate -0.00"),
        (ADAM, {"_component_": "torch.nn.Identity"}, "gives a Identity, which is no LRScheduler"),
    ],
)
def test_what_would_fail_in_the_run_is_said(optimizer, schedule, message):
    with pytest.raises(ConfigError, match=message):
        attempt(optimizer, schedule)
