"""Values and gradients against Eq. 6 written out, in fp64."""

import math
from dataclasses import replace

import pytest
import torch

from oprd_tune.errors import ConfigError
from oprd_tune.losses import HiddenStateMSE
from oprd_tune.losses.masking import StateSelector, select_states
from oprd_tune.losses.streaming import streamed_sum
from oprd_tune.modeling.taps import collect_states
from oprd_tune.ranks import Ranks
from oprd_tune.selection import Selection
from oprd_tune.teacher import FrozenTeacher
from oprd_tune.training.calibration import calibrate
from oprd_tune.training.teachers import Teachers, TeacherSide
from oprd_tune.types import LayerPair
from tests.conftest import DEPTH, make_model
from tests.losses.saved import kept_for_backward
from tests.losses.test_composite import rollout

D = 6
PAIRS = [LayerPair(1, 2), LayerPair(3, 2), LayerPair(4, 5)]


def states(layers, lengths=(9, 9), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(*lengths, D, generator=generator, dtype=torch.float64).to(dtype) for layer in layers}


def plain(normalisation, student, teacher, index_T, scales):
    """Eq. 6 as a sum over tokens, with ordinary autograd on everything at once."""
    total = 0.0
    for pair in PAIRS:
        h = student[pair.student].flatten(0, 1)[index_T]
        g = teacher[pair.teacher].flatten(0, 1)[index_T].detach()
        if normalisation == "l2":
            h, g = h / h.norm(dim=-1, keepdim=True), g / g.norm(dim=-1, keepdim=True)
        total = total + ((h - g) ** 2).sum() / D / scales.get(pair.student, 1.0)
    return total / len(PAIRS)


def streamed(loss, student, teacher, selection):
    targets = {pair.student: teacher[pair.teacher].flatten(0, 1)[selection.teacher_index_T] for pair in PAIRS}
    stream = loss.stream(PAIRS, targets, selection)
    for pair in PAIRS:
        stream(pair.student, student[pair.student])
    return stream


def calibrated(normalisation, teacher, selection):
    loss = HiddenStateMSE(normalisation)
    scales = {}
    if loss.needs_calibration:
        sums = {
            pair.student: teacher[pair.teacher].flatten(0, 1)[selection.index_T].square().mean(-1).sum().item()
            for pair in PAIRS
        }
        loss.calibrate(sums, len(selection))
        scales = {layer: total / len(selection) for layer, total in sums.items()}
    return loss, scales


@pytest.mark.parametrize("lengths", [(1, 1), (2, 7), (3, 50)])
@pytest.mark.parametrize("normalisation", ["none", "l2", "rms"])
def test_value_and_gradient_equal_the_formula(normalisation, lengths):
    mask = torch.rand(lengths) < 0.6
    mask.view(-1)[-1] = True
    selection = select_states(mask, anchor="consume")
    teacher = states([2, 5], lengths, seed=1)
    student = {layer: s.requires_grad_() for layer, s in states([1, 3, 4], lengths).items()}
    loss, scales = calibrated(normalisation, teacher, selection)

    expected = plain(normalisation, student, teacher, selection.index_T, scales)
    wanted = torch.autograd.grad(3.7 * expected, list(student.values()))
    stream = streamed(loss, student, teacher, selection)
    got = torch.autograd.grad(3.7 * stream.total, list(student.values()))

    torch.testing.assert_close(stream.total, expected.detach(), rtol=1e-12, atol=1e-14)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)
    assert any(w.abs().max() > 1e-3 for w in wanted)


@pytest.mark.parametrize("normalisation", ["none", "l2", "rms"])
def test_bf16_states_agree_with_fp64_to_bf16_precision(normalisation):
    selection = select_states(torch.ones(4, 11, dtype=torch.bool), anchor="consume")
    results = {}
    for dtype in (torch.bfloat16, torch.float64):
        teacher = {k: v.bfloat16().to(dtype) for k, v in states([2, 5], (4, 11), seed=1).items()}
        student = {k: v.bfloat16().to(dtype).requires_grad_() for k, v in states([1, 3, 4], (4, 11)).items()}
        loss, _ = calibrated(normalisation, teacher, selection)
        total = streamed(loss, student, teacher, selection).total
        results[dtype] = (total, *torch.autograd.grad(total, list(student.values())))
    for low, high in zip(results[torch.bfloat16], results[torch.float64], strict=True):
        # The sum is fp32 throughout; a gradient is rounded to bf16 twice (8 bits of mantissa).
        torch.testing.assert_close(low.double(), high.double(), rtol=2**-6, atol=1e-3)
    torch.testing.assert_close(results[torch.bfloat16][0].double(), results[torch.float64][0], rtol=1e-3, atol=0)


def test_the_student_at_the_teacher_has_no_loss_and_no_gradient():
    selection = select_states(torch.ones(2, 5, dtype=torch.bool), anchor="consume")
    teacher = states([2, 5], (2, 5))
    student = {p.student: teacher[p.teacher].clone().requires_grad_() for p in PAIRS}
    for normalisation in ("none", "l2", "rms"):
        loss, _ = calibrated(normalisation, teacher, selection)
        total = streamed(loss, student, teacher, selection).total
        assert total.item() == 0
        assert all(g.abs().max() == 0 for g in torch.autograd.grad(total, list(student.values())))


@pytest.mark.parametrize("normalisation", ["none", "l2", "rms"])
def test_the_gradient_depends_on_the_teacher(normalisation):
    selection = select_states(torch.ones(2, 5, dtype=torch.bool), anchor="consume")
    student = {k: v.requires_grad_() for k, v in states([1, 3, 4], (2, 5)).items()}
    gradients = []
    for seed in (1, 2):
        teacher = states([2, 5], (2, 5), seed=seed)
        loss, _ = calibrated(normalisation, teacher, selection)
        gradients.append(torch.autograd.grad(streamed(loss, student, teacher, selection).total, student[1])[0])
    assert (gradients[0] - gradients[1]).abs().max() > 1e-2


def test_the_sum_does_not_depend_on_the_split_into_microbatches():
    mask = torch.rand(6, 10) < 0.5
    student, teacher = states([1, 3, 4], (6, 10)), states([2, 5], (6, 10), seed=1)
    loss = HiddenStateMSE()

    def total(rows):
        selection = select_states(mask[rows], anchor="consume")
        part = {k: v[rows] for k, v in teacher.items()}
        return streamed(loss, {k: v[rows] for k, v in student.items()}, part, selection).total

    whole = total(slice(None))
    torch.testing.assert_close(total(slice(0, 1)) + total(slice(1, 6)), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalisation", ["none", "l2", "rms"])
def test_each_token_counts_as_often_as_its_weight_says(normalisation):
    """Eq. 6 as written, which averages within each response first, is N times the weighted sum over N responses."""
    mask = torch.rand(3, 9) < 0.5
    mask[:, 0] = False
    selection = select_states(mask, anchor="consume")
    row_T = selection.index_T // 9
    weight_T = 1 / row_T.bincount()[row_T].double()
    teacher = states([2, 5])
    teacher = {layer: state[:3] for layer, state in teacher.items()}
    student = {layer: state[:3].requires_grad_() for layer, state in states([1, 3, 4], seed=1).items()}
    loss, scales = calibrated(normalisation, teacher, selection)
    got = streamed(loss, student, teacher, replace(selection, weight_T=weight_T)).total
    wanted = 0.0
    for row in range(3):
        own = selection.index_T[row_T == row]
        wanted = wanted + plain(normalisation, student, teacher, own, scales) / len(own)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=0)
    pairs = (torch.autograd.grad(total, list(student.values()), retain_graph=True) for total in (got, wanted))
    for g, w in zip(*pairs, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


def test_an_empty_selection_still_has_a_graph():
    selection = select_states(torch.zeros(2, 5, dtype=torch.bool))
    student = {k: v.requires_grad_() for k, v in states([1, 3, 4], (2, 5)).items()}
    total = streamed(HiddenStateMSE(), student, states([2, 5], (2, 5)), selection).total
    assert total.item() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(total, list(student.values())))


def test_nothing_but_the_selected_gradients_waits_for_the_backward_pass():
    state = torch.randn(4, 100, D, dtype=torch.bfloat16).requires_grad_()
    kept = kept_for_backward(lambda: streamed_sum(state, torch.arange(0, 400, 50), lambda h: h.square().sum()))
    assert kept == [(torch.bfloat16, 8 * D), (torch.int64, 8)]
    assert streamed_sum(state, torch.arange(3), lambda h: h.sum()).dtype == torch.float32


def test_targets_are_released_layer_by_layer():
    selection = select_states(torch.ones(1, 3, dtype=torch.bool), anchor="consume")
    teacher = states([2, 5], (1, 3))
    targets = {pair.student: teacher[pair.teacher].flatten(0, 1) for pair in PAIRS}
    student = states([1, 3, 4], (1, 3))
    stream = HiddenStateMSE().stream(PAIRS, targets, selection)
    left = []
    for pair in PAIRS:
        stream(pair.student, student[pair.student])
        left.append(sorted(targets))
    assert left == [[3, 4], [4], []]


def test_measures_cosine_and_error_whatever_the_normalisation():
    selection = Selection(torch.arange(4), torch.tensor([0, 2, 13, 13]), torch.arange(4))
    student, teacher = states([1, 3, 4], (1, 4)), states([2, 5], (1, 4), seed=1)
    stream = streamed(HiddenStateMSE("l2"), student, teacher, selection)
    h, g = student[4][0], teacher[5][0]
    cosines = (h * g).sum(-1) / h.norm(dim=-1) / g.norm(dim=-1)
    means = stream.metrics.reduce(Ranks())
    assert means["layers/cosine_04"] == pytest.approx(cosines.mean().item())
    assert means["layers/mse_04"] == pytest.approx(((h - g) ** 2).mean().item())
    quarters = [means.pop(f"positions/cosine_quarter_{n}") for n in (1, 4)]  # of two tokens each, in three layers
    layers = [means.pop(f"layers/cosine_0{pair.student}") for pair in PAIRS]
    assert 6 * sum(quarters) == pytest.approx(4 * sum(layers), rel=1e-5)
    assert means.keys() == {"layers/mse_01", "layers/mse_03", "layers/mse_04"}
    row = stream.metrics.reduce_maps(Ranks())["layers/cosine_by_position"][-1]
    assert [row[0], row[2], row[13]] == pytest.approx([cosines[0].item(), cosines[1].item(), cosines[2:].mean().item()])
    assert sum(map(math.isnan, row)) == 13
    targets = {pair.student: teacher[pair.teacher].flatten(0, 1) for pair in PAIRS}
    unmeasured = HiddenStateMSE("l2").stream(PAIRS, targets, selection, measured=False)
    for pair in PAIRS:
        unmeasured(pair.student, student[pair.student])
    assert unmeasured.metrics.reduce(Ranks()) == {}
    assert torch.equal(unmeasured.total, stream.total)


def test_coefficient_scales_and_constructor_explains():
    selection = select_states(torch.ones(1, 3, dtype=torch.bool), anchor="consume")
    student, teacher = states([1, 3, 4], (1, 3)), states([2, 5], (1, 3), seed=1)
    one, two = (streamed(HiddenStateMSE(coefficient=c), student, teacher, selection).total for c in (1, 2))
    torch.testing.assert_close(2 * one, two)
    with pytest.raises(ConfigError, match="'unit'; allowed are none, l2, rms"):
        HiddenStateMSE("unit")
    with pytest.raises(ConfigError, match="loss.coefficient is -1; it must be a finite number, 0 or above"):
        HiddenStateMSE(coefficient=-1)


def test_rms_scales_are_the_teachers_mean_squares_at_the_selected_states_of_all_microbatches():
    pairs = [LayerPair(1, 2), LayerPair(2, 2), LayerPair(DEPTH, DEPTH)]
    loss, select, batch = HiddenStateMSE("rms"), StateSelector("first_k", 3), rollout()
    micro_batches = batch.split(9)
    teachers = Teachers([TeacherSide(FrozenTeacher(make_model(), pairs), pairs)])
    calibrate(loss, teachers, [*micro_batches, batch.idle()], select, Ranks())
    index_T = select(batch).index_T
    assert (len(micro_batches), len(index_T), loss.needs_calibration) == (2, 5, False)
    found = collect_states(make_model(), batch.tokens_BS, [(pair.teacher, index_T, None) for pair in pairs])
    wanted = {pair.student: state.square().mean().item() for pair, state in zip(pairs, found, strict=True)}
    assert loss.scales == pytest.approx(wanted, rel=1e-5)
    before = dict(loss.scales)
    for uncalled in (loss, HiddenStateMSE(), None):  # done already, or nothing to do
        calibrate(uncalled, None, micro_batches, select, Ranks())
    assert loss.scales == before


def test_rms_scales_survive_a_checkpoint_and_must_be_positive():
    loss = HiddenStateMSE("rms")
    loss.calibrate({1: 8.0, 2: 2.0}, 4)
    restored = HiddenStateMSE("rms")
    restored.load_state_dict(loss.state_dict())
    assert restored.scales == {1: 2.0, 2: 0.5}
    assert not restored.needs_calibration
    with pytest.raises(ValueError, match=r"layers \[2\] are zero"):
        HiddenStateMSE("rms").calibrate({1: 1.0, 2: 0.0}, 4)
