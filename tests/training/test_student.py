"""What trains, how gradients come together, and how a step is taken."""

import math

import pytest
import torch
from torch import nn

from oprd_tune.modeling.freezing import freeze
from oprd_tune.training.drift import TiedHeadDrift
from oprd_tune.training.gradients import FiniteGuard, backward, clip_gradients
from tests.conftest import make_model


def test_microbatches_of_any_size_give_the_gradient_of_the_global_mean():
    x = torch.randn(7, 3, dtype=torch.float64)
    gradients = []
    for sizes in ([7], [1, 6], [3, 3, 1]):
        weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        for part in x.split(sizes):
            backward((part @ weight).square().sum(), 7)
        gradients.append(weight.grad)
    for gradient in gradients:
        torch.testing.assert_close(gradient, (2 * (x @ torch.ones(3).double())[:, None] * x).mean(0))


def test_world_size_undoes_the_average_over_ranks():
    weight = nn.Parameter(torch.ones(1))
    backward(3 * weight.sum(), 6, world_size=4)
    assert weight.grad.item() == 3 * 4 / 6


def test_clipping_returns_the_norm_before():
    for max_norm, after in ((1.0, 1.0), (None, 5.0), (10.0, 5.0)):
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([3.0, 4.0])
        assert clip_gradients([weight], max_norm) == 5.0
        assert math.isclose(weight.grad.norm().item(), after, rel_tol=1e-5)


def test_steps_that_are_not_finite_are_refused_and_stop_the_run_when_they_repeat():
    guard = FiniteGuard(2)
    assert guard.allows(1, loss=1.0, grad_norm=1.0)
    assert not guard.allows(2, loss=math.nan, grad_norm=1.0)
    assert guard.allows(3, loss=1.0, grad_norm=1.0)
    assert not guard.allows(4, loss=1.0, grad_norm=math.inf)
    with pytest.raises(FloatingPointError, match="step 5: .*; the 2. step in a row that is not finite$"):
        guard.allows(5, loss=math.nan, grad_norm=1.0)


@pytest.mark.parametrize("tied", [True, False])
def test_only_what_the_loss_reaches_is_trained(tied):
    model = make_model(tied=tied)
    message = freeze(model, top=2, trains_head=False, freeze_embedding=True)
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0", "1"}
    assert "blocks above layer 2" in message
    assert ("the LM head" in message) == (not tied)
    model = make_model(tied=tied)
    assert freeze(model, top=3, trains_head=True, freeze_embedding=False) == ""
    assert all(p.requires_grad for p in model.parameters())


def test_drift_of_a_tied_head_is_relative_and_survives_a_checkpoint():
    model = make_model()
    drift = TiedHeadDrift(model)
    assert drift.measure(model) == 0
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(1.25)
    assert math.isclose(drift.measure(model), 0.25, rel_tol=1e-5)
    later = TiedHeadDrift(model)
    later.load_state_dict(drift.state_dict())
    assert math.isclose(later.measure(model), 0.25, rel_tol=1e-5)
    assert TiedHeadDrift(make_model(tied=False)).measure(model) is None
