"""Optimizers that train whole parameters, and fail on those that are sharded, are told before models are loaded."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from oprd_tune.config import Component
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.sharding import Sharding
from oprd_tune.preflight.trial import try_optimizer
from oprd_tune.ranks import Ranks
from oprd_tune.run.launcher import run_recipe
from tests.conftest import SMALL, load_config, recipe_class
from tests.distributed.spawn import run_ranks


class WholeOnly(torch.optim.SGD):
    """An optimizer that cannot step on DTensors."""

    def step(self, closure=None):
        if any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            raise RuntimeError("aten.lerp: got mixed torch.Tensor and DTensor")
        return super().step(closure)


class OwnLayout(torch.optim.SGD):
    """An optimizer that steps on DTensors, and whose state no checkpoint can hold then."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["mine"] = (lambda: 0) if isinstance(p, DTensor) else torch.zeros(3)


class LastRankFails(torch.optim.SGD):
    """An optimizer that fails on one rank alone."""

    def step(self, closure=None):
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("an empty shard")
        return super().step(closure)


SGD = {"_component_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
PASS = {"Adam": ({"_component_": "torch.optim.AdamW", "fused": True}, 8), "SGD": (SGD, 4)}
SHARDED = (
    r"optimizer: \S+ trains whole parameters, but not those that FSDP2 has sharded \(.*%s.*\); give one that knows"
)
FAIL = {
    f"{__name__}.WholeOnly": SHARDED % "RuntimeError: aten.lerp: got mixed",
    f"{__name__}.OwnLayout": SHARDED % "",
    f"{__name__}.LastRankFails": "an empty shard",
    "torch.optim.Adafactor": SHARDED % "in-place operations that require placement changes",
    "torch.optim.LBFGS": "optimizer: torch.optim.LBFGS takes no step as runs do it, without a closure: ",
}


def attempt(ranks, folder, section):
    component = Component.find("optimizer", section)
    plan = {"max_steps": 10, "dtype": torch.float32, "device": torch.device("cpu")}
    return try_optimizer(component, None, **plan, sharding=Sharding(ranks), folder=folder)


def on_two_ranks(rank, folder):
    ranks = Ranks(rank, 2)
    for section, expected in PASS.values():
        assert attempt(ranks, folder, section) == expected
    for path, told in FAIL.items():
        with pytest.raises(ConfigError, match=told):
            attempt(ranks, folder, {"_component_": path, "lr": 0.1})
    ranks.wait()
    assert not list(folder.iterdir())


def a_run(rank, folder):
    overrides = {**SMALL, "optimizer": f"{{_component_: {__name__}.WholeOnly, lr: 0.1}}"}
    cfg = load_config("tiny/oprd", output_dir=folder / "out", **overrides)
    assert run_recipe(recipe_class("oprd_distributed"), cfg) == 2
    assert not (folder / "out" / "checkpoints").exists()


def test_two_ranks_try_what_they_will_train(tmp_path):
    (tmp_path / "shared").mkdir()
    run_ranks(on_two_ranks, 2, tmp_path / "ranks", tmp_path / "shared")


def test_a_run_on_two_ranks_is_refused_and_the_same_on_one_is_not(tmp_path, capfd):
    run_ranks(a_run, 2, tmp_path / "ranks", tmp_path)
    assert "WholeOnly trains whole parameters, but not those that FSDP2 has sharded" in capfd.readouterr().err
    cfg = load_config("tiny/oprd", output_dir=tmp_path / "one", preflight="only", **SMALL)
    cfg.optimizer = {"_component_": f"{__name__}.WholeOnly", "lr": 0.1}
    assert run_recipe(recipe_class("oprd_distributed"), cfg) == 0
