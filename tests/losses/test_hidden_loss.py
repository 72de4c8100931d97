"""Losses on hidden states from any error between two of them, here Huber's, with and without a bridge, in fp64."""

import pytest
import torch
from torch.nn import functional as F

from oprd_tune.errors import ConfigError
from oprd_tune.losses import BridgedMSE, Composite, FullReverseKL, HiddenStateLoss, HiddenStateMSE
from oprd_tune.losses.masking import select_states
from oprd_tune.losses.state_errors import squared_error, summed_error
from oprd_tune.ranks import Ranks
from tests.losses.test_bridged_mse import C, D, R, states
from tests.losses.test_composite import gradients
from tests.modeling.bridges import PAIRS, make_bridge

each_way = pytest.mark.parametrize("bridged", [False, True])


def huber(student_TD, teacher_TD):
    return F.huber_loss(student_TD, teacher_TD, reduction="none", delta=0.7).sum(-1)


def case(bridged, lengths=(2, 5), *, seed=1, marked=1.0):
    """A selection, a bridge or none, and both models' states."""
    mask = torch.rand(lengths, generator=torch.Generator().manual_seed(0)) < marked
    student = {layer: state.requires_grad_() for layer, state in states([1, 3, 4], lengths, D).items()}
    bridge = make_bridge(PAIRS, D, C, rank=R) if bridged else None
    return select_states(mask, anchor="consume"), bridge, student, states([2, 6], lengths, C if bridged else D, seed)


def streamed(loss, selection, bridge, student, teacher):
    targets = {pair.student: teacher[pair.teacher].flatten(0, 1)[selection.teacher_index_T] for pair in PAIRS}
    if bridge is not None:
        targets = {layer: bridge.teacher(layer, state_TC) for layer, state_TC in targets.items()}
    stream = loss.stream(PAIRS, targets, selection, bridge)
    for pair in PAIRS:
        stream(pair.student, student[pair.student])
    return stream


def compared(pair, selection, bridge, student, teacher):
    """The two tensors that an error compares."""
    h, g = student[pair.student].flatten(0, 1), teacher[pair.teacher].flatten(0, 1)
    h, g = h[selection.index_T], g[selection.index_T]
    if bridge is None:
        return h, g
    own = {name: value.double() for name, value in vars(bridge._layers[pair.student]).items()}
    return (h - own["student_mean_D"]) @ own["student_RD"].T, (g - own["teacher_mean_C"]) @ own["teacher_RC"].T


def plain(*case):
    """1/|layers| · Σ_ℓ Σ_t Σ_d of d²/2 where |d| ≤ 0.7, and of 0.7 · (|d| − 0.35) elsewhere."""
    total = 0.0
    for pair in PAIRS:
        h, g = compared(pair, *case)
        away = (h - g).abs()
        total = total + torch.where(away <= 0.7, away.square() / 2, 0.7 * (away - 0.35)).sum()
    return total / len(PAIRS)


@each_way
@pytest.mark.parametrize("lengths", [(1, 1), (2, 7), (3, 50)])
@pytest.mark.parametrize("error", [huber, f"{__name__}.huber"], ids=["function", "path"])
def test_value_and_gradient_equal_the_formula(error, lengths, bridged):
    parts = case(bridged, lengths, marked=0.95)
    student = parts[2]
    expected = 2 * plain(*parts)
    wanted = torch.autograd.grad(3.7 * expected, list(student.values()))
    total = streamed(HiddenStateLoss(error, coefficient=2.0), *parts).total
    got = torch.autograd.grad(3.7 * total, list(student.values()))
    torch.testing.assert_close(total, expected.detach(), rtol=1e-11, atol=1e-13)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)
        assert w.abs().max() > 1e-3


def test_given_the_errors_of_the_paper_it_is_their_loss_bit_by_bit():
    for bridged, error, named in ((False, squared_error, HiddenStateMSE()), (True, summed_error, BridgedMSE("none"))):
        parts = case(bridged)
        one, other = (streamed(loss, *parts).total for loss in (HiddenStateLoss(error), named))
        assert torch.equal(one, other)
        assert all(map(torch.equal, *(torch.autograd.grad(t, list(parts[2].values())) for t in (one, other))))


@each_way
def test_an_empty_selection_still_has_a_graph(bridged):
    parts = case(bridged, marked=0.0)
    total = streamed(HiddenStateLoss(huber), *parts).total
    assert total.item() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(total, list(parts[2].values())))


@each_way
def test_the_gradient_depends_on_the_teacher(bridged):
    one, other = (
        torch.autograd.grad(streamed(HiddenStateLoss(huber), *parts).total, parts[2][1])[0]
        for parts in (case(bridged, seed=seed) for seed in (1, 2))
    )
    assert (one - other).abs().max() > 1e-2


def test_the_student_at_the_teacher_has_no_loss_and_no_gradient():
    selection, _, _, teacher = case(bridged=False)
    student = {pair.student: teacher[pair.teacher].clone().requires_grad_() for pair in PAIRS}
    total = streamed(HiddenStateLoss(huber), selection, None, student, teacher).total
    assert total.item() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(total, list(student.values())))


@each_way
def test_measures_cosine_and_squared_error_whatever_the_error(bridged):
    parts = case(bridged)
    means = streamed(HiddenStateLoss(huber), *parts).metrics.reduce(Ranks())
    for pair in PAIRS:
        h, g = compared(pair, *parts)
        cosine = (h * g).sum(-1) / h.norm(dim=-1) / g.norm(dim=-1)
        assert means[f"layers/cosine_0{pair.student}"] == pytest.approx(cosine.mean().item())
        assert means[f"layers/mse_0{pair.student}"] == pytest.approx((h - g).square().mean().item())


def test_an_error_sees_fp32_and_what_it_keeps_is_gone_with_its_layer():
    seen = []

    def error(student_TD, teacher_TD):
        seen.append((student_TD.dtype, teacher_TD.dtype, student_TD.requires_grad, teacher_TD.requires_grad))
        return huber(student_TD, teacher_TD)

    selection, bridge, student, teacher = case(bridged=False)
    student, teacher = ({k: v.detach().bfloat16() for k, v in part.items()} for part in (student, teacher))
    student = {layer: state.requires_grad_() for layer, state in student.items()}
    total = streamed(HiddenStateLoss(error), selection, bridge, student, teacher).total
    assert seen == [(torch.float32, torch.float32, True, False)] * len(PAIRS)
    total.backward()
    assert len(seen) == len(PAIRS)
    assert all(state.grad.dtype == torch.bfloat16 for state in student.values())


def test_it_may_be_a_part_of_a_composite():
    parts = {"opd": FullReverseKL(), "own": HiddenStateLoss(squared_error, coefficient=2.0)}
    got, sums_P, _ = gradients(Composite(parts))
    want, wanted_P, _ = gradients(Composite({"opd": FullReverseKL(), "own": HiddenStateMSE()}, {"own": 2.0}))
    torch.testing.assert_close(sums_P, wanted_P)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "loss.error 3 is no function; give the dotted path of one"),
        ((f"{__name__}.PAIRS",), r"loss.error \[.* is no function"),
        (
            (f"{__name__}.hubert",),
            "loss.error 'tests.losses.test_hidden_loss.hubert' cannot be found in .*; did you mean .*huber",
        ),
        (("nowhere.at_all",), "loss.error 'nowhere.at_all' cannot be found: "),
        ((huber, -1), "loss.coefficient is -1; it must be a finite number, 0 or above"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        HiddenStateLoss(*arguments)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            lambda h, g: (h - g).square(),
            r"loss.error returned \(\d+, \d+\); it must return one value a token: \(\d+,\)",
        ),
        (lambda h, g: huber(h, g).mean(), r"loss.error returned \(\); it must return one value a token"),
        (lambda h, g: 0.5, "loss.error returned float; it must return one value a token"),
        (lambda h, g: g.square().sum(-1), "does not depend on the student"),
    ],
)
def test_what_a_function_returns_is_checked(error, message):
    with pytest.raises(ConfigError, match=message):
        streamed(HiddenStateLoss(error), *case(False))
