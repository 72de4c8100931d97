"""A loss that would fail in the first step fails before weights are read."""

import pytest
import torch
from omegaconf import OmegaConf

from oprd_tune import losses
from oprd_tune.config.components import Component
from oprd_tune.errors import ConfigError
from oprd_tune.grading import exact_match
from oprd_tune.losses import HiddenStateLoss, HiddenStateMSE, PerTokenLoss
from oprd_tune.losses.composite import as_composite
from oprd_tune.losses.token_loss import DenseTokenLoss
from oprd_tune.preflight.loss_trial import try_losses
from oprd_tune.registry import config_files
from oprd_tune.run import launcher
from tests.conftest import load_config, recipe_class

CPU = torch.device("cpu")


def attempt(loss, width=6, vocabulary=30):
    try_losses(as_composite(loss), width=width, vocabulary=vocabulary, device=CPU)


@pytest.mark.parametrize("name", [name for name, file in config_files().items() if "\nloss:" in file.read_text()])
def test_the_losses_of_all_configs_pass(name):
    attempt(Component.find("loss", OmegaConf.to_container(load_config(name))["loss"])())


@pytest.mark.parametrize("name", [n for n in losses.__all__ if isinstance(getattr(losses, n), type)])
def test_our_losses_pass(name):
    kind = getattr(losses, name)
    if kind in (HiddenStateLoss, PerTokenLoss, losses.Composite):
        return
    attempt(kind(grader=exact_match) if kind is losses.TaskReward else kind())


def wrong_name(student_TD, teacher_TD):
    return (student_TD - teacher_TD).sqare().mean(-1)


def one_number(student_TD, teacher_TD):
    return (student_TD - teacher_TD).square().mean()


def root_of_negatives(student_TD, teacher_TD):
    return (student_TD - teacher_TD).sqrt().mean(-1)


def wants_a_width(student_TD, teacher_TD):
    return (student_TD @ torch.ones(6, 2)).sum(-1)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (wrong_name, r"HiddenStateLoss fails on made-up tokens: AttributeError: .*sqare.*test_loss_trial.py, line \d+"),
        (one_number, r"loss.error returned \(\); it must return one value a token"),
        (root_of_negatives, "HiddenStateLoss gives a loss that is not finite"),
    ],
)
def test_a_mistake_in_an_error_is_told_with_its_place(error, said):
    with pytest.raises(ConfigError, match=said):
        attempt(HiddenStateLoss(error))


def test_an_error_gets_states_of_the_runs_width():
    attempt(HiddenStateLoss(wants_a_width), width=6)
    with pytest.raises(ConfigError, match="RuntimeError"):
        attempt(HiddenStateLoss(wants_a_width), width=7)


class Broken(DenseTokenLoss):
    def objective(self, chunk, metrics):
        return chunk.log_p_TV[:, 0] / chunk.nothing, chunk.log_ratio_TV


class Halved(DenseTokenLoss):
    def objective(self, chunk, metrics):
        return chunk.log_p_TV[:2, 0], chunk.log_ratio_TV


@pytest.mark.parametrize(("loss", "said"), [(Broken, "no attribute 'nothing'"), (Halved, "one value a token")])
def test_a_token_loss_is_tried_too(loss, said):
    with pytest.raises(ConfigError, match=said):
        attempt(loss())


def test_nothing_random_moves():
    before = torch.random.get_rng_state()
    attempt(HiddenStateMSE())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_run_ends_before_weights_are_read(out, capsys, monkeypatch):
    monkeypatch.setattr("oprd_tune.training.student.load_weights", lambda *_, **__: pytest.fail("weights were read"))
    cfg = load_config("tiny/oprd", output_dir=str(out))
    cfg.loss = {"_component_": "oprd_tune.losses.HiddenStateLoss", "error": f"{__name__}.wrong_name"}
    assert launcher.run_recipe(recipe_class("oprd_distributed"), cfg) == 2
    assert "error: loss: HiddenStateLoss fails on made-up tokens" in capsys.readouterr().err
    assert not (out / "final").exists()
