"""Values and gradients of the bridged loss against its formula written out, in fp64."""

import pytest
import torch

from oprd_tune.errors import ConfigError
from oprd_tune.losses import BridgedMSE
from oprd_tune.losses.masking import select_states
from oprd_tune.modeling.taps import collect_states
from oprd_tune.teacher import FrozenTeacher
from oprd_tune.types import LayerPair
from tests.conftest import DEPTH, VOCAB, WIDTH, make_model
from tests.losses.saved import kept_for_backward
from tests.modeling.bridges import PAIRS, identity_bridge, make_bridge

D, C, R = 5, 7, 3
NORMALISATIONS = ["l2", "variance", "none"]


def states(layers, lengths, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(*lengths, width, generator=generator, dtype=torch.float64) for layer in layers}


def streamed(loss, bridge, student, teacher, selection):
    targets = {
        pair.student: bridge.teacher(pair.student, teacher[pair.teacher].flatten(0, 1)[selection.teacher_index_T])
        for pair in PAIRS
    }
    stream = loss.stream(PAIRS, targets, selection, bridge)
    for pair in PAIRS:
        stream(pair.student, student[pair.student])
    return stream


def plain(normalisation, bridge, student, teacher, index_T):
    """1/|layers| · Σ_ℓ Σ_t ‖z_S − z_T‖², token by token; z = P (state − mean)."""
    total = 0.0
    for pair in PAIRS:
        own = {name: value.double() for name, value in vars(bridge._layers[pair.student]).items()}
        scale = sum(bridge.report[pair.student].spectrum[:R]) if normalisation == "variance" else 1.0
        for t in index_T.tolist():
            h = student[pair.student].flatten(0, 1)[t] - own["student_mean_D"]
            g = teacher[pair.teacher].flatten(0, 1)[t].detach() - own["teacher_mean_C"]
            z_student = sum(own["student_RD"][:, d] * h[d] for d in range(D))
            z_teacher = sum(own["teacher_RC"][:, c] * g[c] for c in range(C))
            if normalisation == "l2":
                z_student = z_student / z_student.square().sum().sqrt()
                z_teacher = z_teacher / z_teacher.square().sum().sqrt()
            total = total + ((z_student - z_teacher) ** 2).sum() / scale
    return total / len(PAIRS)


@pytest.mark.parametrize("lengths", [(1, 1), (2, 7), (3, 11)])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_value_and_gradient_equal_the_formula(normalisation, lengths):
    mask = torch.rand(lengths) < 0.6
    mask.view(-1)[-1] = True
    selection = select_states(mask, anchor="consume")
    bridge = make_bridge(PAIRS, D, C, rank=R)
    teacher = states([2, 6], lengths, C, seed=1)
    student = {layer: s.requires_grad_() for layer, s in states([1, 3, 4], lengths, D).items()}

    expected = plain(normalisation, bridge, student, teacher, selection.index_T)
    wanted = torch.autograd.grad(3.7 * expected, list(student.values()))
    stream = streamed(BridgedMSE(normalisation), bridge, student, teacher, selection)
    got = torch.autograd.grad(3.7 * stream.total, list(student.values()))

    precision = 1e-6 if normalisation == "variance" else 1e-11  # the variance is kept in fp32
    torch.testing.assert_close(stream.total, expected.detach(), rtol=precision, atol=1e-13)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=precision, atol=1e-12)
    assert all(w.abs().max() > 1e-3 for w in wanted)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_bf16_states_agree_with_fp64_to_bf16_precision(normalisation):
    selection = select_states(torch.ones(2, 11, dtype=torch.bool), anchor="consume")
    bridge, results = make_bridge(PAIRS, D, C, rank=R), {}
    for dtype in (torch.bfloat16, torch.float64):
        teacher = {k: v.bfloat16().to(dtype) for k, v in states([2, 6], (2, 11), C, seed=1).items()}
        student = {k: v.bfloat16().to(dtype).requires_grad_() for k, v in states([1, 3, 4], (2, 11), D).items()}
        total = streamed(BridgedMSE(normalisation), bridge, student, teacher, selection).total
        results[dtype] = (total, *torch.autograd.grad(total, list(student.values())))
    torch.testing.assert_close(results[torch.bfloat16][0].double(), results[torch.float64][0], rtol=1e-5, atol=0)
    for low, high in zip(results[torch.bfloat16], results[torch.float64], strict=True):
        torch.testing.assert_close(low.double(), high.double(), rtol=2**-6, atol=1e-3 * high.abs().max().item())


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_an_empty_selection_still_has_a_graph(normalisation):
    selection = select_states(torch.zeros(2, 5, dtype=torch.bool))
    student = {k: v.requires_grad_() for k, v in states([1, 3, 4], (2, 5), D).items()}
    bridge = make_bridge(PAIRS, D, C, rank=R)
    total = streamed(BridgedMSE(normalisation), bridge, student, states([2, 6], (2, 5), C), selection).total
    assert total.item() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(total, list(student.values())))


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_the_sum_does_not_depend_on_the_split_into_microbatches(normalisation):
    mask = torch.rand(6, 10) < 0.5
    student, teacher = states([1, 3, 4], (6, 10), D), states([2, 6], (6, 10), C, seed=1)
    loss, bridge = BridgedMSE(normalisation), make_bridge(PAIRS, D, C, rank=R)

    def total(rows):
        selection = select_states(mask[rows], anchor="consume")
        own, its = ({k: v[rows] for k, v in part.items()} for part in (student, teacher))
        return streamed(loss, bridge, own, its, selection).total

    torch.testing.assert_close(total(slice(0, 1)) + total(slice(1, 6)), total(slice(None)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_over_a_bridge_that_only_shifts_the_shifted_teacher_has_no_loss_and_no_gradient(normalisation):
    selection = select_states(torch.ones(2, 5, dtype=torch.bool), anchor="consume")
    teacher = states([2, 6], (2, 5), D)
    student = {p.student: (teacher[p.teacher] - 4).requires_grad_() for p in PAIRS}
    loss, bridge = BridgedMSE(normalisation), identity_bridge(PAIRS, D)
    total = streamed(loss, bridge, student, teacher, selection).total
    assert total.item() < 1e-10
    assert all(g.abs().max() < 1e-4 for g in torch.autograd.grad(total, list(student.values())))
    far = {layer: (state + torch.randn_like(state)).detach() for layer, state in student.items()}
    assert streamed(loss, bridge, far, teacher, selection).total > 0.1


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_the_gradient_depends_on_the_teacher(normalisation):
    selection = select_states(torch.ones(2, 5, dtype=torch.bool), anchor="consume")
    student = {k: v.requires_grad_() for k, v in states([1, 3, 4], (2, 5), D).items()}
    loss, bridge = BridgedMSE(normalisation), make_bridge(PAIRS, D, C, rank=R)
    totals = [streamed(loss, bridge, student, states([2, 6], (2, 5), C, seed=seed), selection).total for seed in (1, 2)]
    one, other = (torch.autograd.grad(total, student[1])[0] for total in totals)
    assert (one - other).abs().max() > 1e-2


def test_a_guess_of_the_mean_costs_one_under_variance_and_two_unit_vectors_at_most_four():
    bridge = make_bridge(PAIRS, D, C, rank=R)
    selection = select_states(torch.ones(1, 400, dtype=torch.bool), anchor="consume")
    fit = {pair.student: vars(bridge._layers[pair.student]) for pair in PAIRS}
    student = {layer: own["student_mean_D"].expand(1, 400, D) for layer, own in fit.items()}
    spread = {layer: own["teacher_RC"] for layer, own in fit.items()}
    targets = {}
    for layer, directions_RC in spread.items():
        spectrum_R = torch.tensor(bridge.report[layer].spectrum[:R])
        z = torch.randn(400, R) * spectrum_R.sqrt()
        z = z * (spectrum_R.sum() / z.square().sum(-1).mean()).sqrt()
        targets[layer] = bridge.teacher(layer, z @ directions_RC + fit[layer]["teacher_mean_C"])
        torch.testing.assert_close(targets[layer], z, rtol=1e-4, atol=1e-4)
    stream = BridgedMSE("variance").stream(PAIRS, dict(targets), selection, bridge)
    for pair in PAIRS:
        stream(pair.student, student[pair.student])
    assert stream.total.item() / 400 == pytest.approx(1, rel=1e-4)
    opposite = identity_bridge(PAIRS, D)
    teacher = states([2, 6], (1, 9), D)
    away = {p.student: -(teacher[p.teacher] - 4) for p in PAIRS}
    means = {p.student: vars(opposite._layers[p.student])["student_mean_D"].double() for p in PAIRS}
    away = {layer: state + 2 * means[layer] for layer, state in away.items()}
    selection = select_states(torch.ones(1, 9, dtype=torch.bool), anchor="consume")
    assert streamed(BridgedMSE("l2"), opposite, away, teacher, selection).total.item() / 9 == pytest.approx(4, rel=1e-6)


def test_nothing_of_a_bridge_trains():
    bridge = make_bridge(PAIRS, D, C, rank=R)
    tensors = [tensor for own in bridge._layers.values() for tensor in vars(own).values()]
    assert len(tensors) == 5 * len(PAIRS)
    assert not any(tensor.requires_grad for tensor in tensors)
    selection = select_states(torch.ones(1, 4, dtype=torch.bool), anchor="consume")
    teacher = {layer: state.requires_grad_() for layer, state in states([2, 6], (1, 4), C).items()}
    student = {layer: state.requires_grad_() for layer, state in states([1, 3, 4], (1, 4), D).items()}
    streamed(BridgedMSE("none"), bridge, student, teacher, selection).total.backward()
    assert all(state.grad is None for state in teacher.values())
    assert all(tensor.grad is None for tensor in tensors)
    assert all(state.grad.count_nonzero() for state in student.values())


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_what_waits_for_the_backward_pass_has_the_rank_of_the_bridge(normalisation):
    tokens = 4000  # so that the bridge itself, which is always there, is small beside what waits
    selection = select_states(torch.ones(1, tokens, dtype=torch.bool), anchor="consume")
    bridge, teacher = make_bridge(PAIRS, D, C, rank=R), states([2, 6], (1, tokens), C)
    student = {k: v.bfloat16().requires_grad_() for k, v in states([1, 3, 4], (1, tokens), D).items()}
    loss = BridgedMSE(normalisation)
    kept = kept_for_backward(lambda: streamed(loss, bridge, student, teacher, selection).total)
    large = [(dtype, numbers) for dtype, numbers in kept if numbers >= tokens]
    assert large == [*[(torch.float32, R * tokens)] * len(PAIRS), (torch.int64, tokens)]


def test_coefficient_scales_and_constructor_explains():
    selection = select_states(torch.ones(1, 3, dtype=torch.bool), anchor="consume")
    student, teacher = states([1, 3, 4], (1, 3), D), states([2, 6], (1, 3), C)
    bridge = make_bridge(PAIRS, D, C, rank=R)
    one, five = (streamed(BridgedMSE("l2", c), bridge, student, teacher, selection).total for c in (1, 5))
    torch.testing.assert_close(5 * one, five)
    with pytest.raises(ConfigError, match="'rms'; allowed are l2, variance, none"):
        BridgedMSE("rms")
    with pytest.raises(ConfigError, match="loss.coefficient is -1; it must be a finite number, 0 or above"):
        BridgedMSE(coefficient=-1)
    assert not any(BridgedMSE(normalisation).needs_calibration for normalisation in NORMALISATIONS)


@pytest.mark.parametrize("final", [False, True])
def test_a_teacher_projects_what_it_would_have_given_whole(final):
    pairs = [LayerPair(1, 2), LayerPair(2, 2), LayerPair(4, DEPTH)]
    bridge = make_bridge(pairs, D, WIDTH, rank=R)
    tokens = torch.randint(0, VOCAB, (2, 7))
    index_T, final_index_T = torch.tensor([0, 3, 12]), torch.tensor([1, 2])
    whole = collect_states(make_model(), tokens, [(2, index_T, None), (DEPTH, index_T, None)])
    unbridged = FrozenTeacher(make_model(), pairs, final=final).targets(tokens, index_T)
    teacher = FrozenTeacher(make_model(), pairs, final=final, bridge=bridge)
    targets = teacher.targets(tokens, index_T, final_index_T if final else None)
    assert list(targets.states) == list(unbridged.states) == [1, 2, 4]
    for layer, state_TC in zip((1, 2, 4), (whole[0], whole[0], whole[1]), strict=True):
        assert torch.equal(unbridged.states[layer], state_TC)
        assert torch.equal(targets.states[layer], bridge.teacher(layer, state_TC))
        assert targets.states[layer].shape == (3, R)
    assert not torch.allclose(targets.states[1], targets.states[2])
    if final:
        (expected,) = collect_states(make_model(), tokens, [(DEPTH, final_index_T, None)])
        assert torch.equal(targets.final_TC, expected)
    else:
        assert targets.final_TC is None
