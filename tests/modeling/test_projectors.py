"""Closed forms against what they minimise, bases against their definitions, figures of merit against the rows."""

import math

import pytest
import torch

from oprd_tune.modeling.moments import PairMoments
from oprd_tune.modeling.projectors import BASES, HeldOut, fit_projectors
from oprd_tune.ranks import Ranks

D, C, F, N, CPU = 5, 4, 4, 60, torch.device("cpu")
CASES = [(D, C), (3, 6)]


def rows(count=N, *, width=D, teacher_width=C, seed=0):
    """Student states, teacher states that partly follow from them, and what follows from those; means are not zero."""
    generator = torch.Generator().manual_seed(seed)
    world = torch.Generator().manual_seed(9)

    def noise(*shape, generator=generator):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h = noise(count, width) @ noise(width, width, generator=world) + 1.5
    g = h @ noise(width, teacher_width, generator=world) + 2 * noise(count, teacher_width) - 0.7
    f = g @ noise(teacher_width, teacher_width, generator=world) + 3 * noise(count, teacher_width) + 5
    return h, g, f


def moments_of(h, g, f=None, dtype=torch.float64):
    outcome_width = None if f is None else f.shape[1]
    moments = PairMoments(h.shape[1], g.shape[1], outcome_width=outcome_width, dtype=dtype, device=CPU)
    moments.add(h, g, f)
    return moments


def fitted(h, g, f=None, **kwargs):
    return fit_projectors(moments_of(h, g, f), **{"basis": "pca", **kwargs})


def minimised(objective, *shape):
    """Where gradient descent from zero ends."""
    parameter = torch.zeros(*shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameter],
        max_iter=3000,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-13,
        tolerance_change=0,
    )

    def closure():
        optimizer.zero_grad()
        loss = objective(parameter)
        loss.backward()
        return loss

    optimizer.step(closure)
    return parameter.detach()


def targets(fit, g):
    return (g - g.mean(0)) @ fit.teacher_RC.T


def eigenvectors(symmetric):
    """As rows, the largest eigenvalue first."""
    return torch.linalg.eigh(symmetric).eigenvectors.flip(1).T


def main_directions(matrix):
    """As rows, the right singular vectors."""
    return torch.linalg.svd(matrix, full_matrices=False)[2]


def regressed(target, on):
    """The prediction of one by the other, both centred."""
    target, on = target - target.mean(0), on - on.mean(0)
    return on @ torch.linalg.lstsq(on, target).solution


def assert_same_lines(got, wanted):
    """Rows are equal up to their signs."""
    signs = (got * wanted).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(got * signs, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("width", "teacher_width"), CASES)
def test_without_an_intercept_it_is_the_minimum_of_eq_13_itself(basis, width, teacher_width):
    h, g, f = rows(width=width, teacher_width=teacher_width)
    fit = fitted(h, g, f, basis=basis, intercept=False)
    z = targets(fit, g)
    wanted = minimised(lambda p: (h @ p.T - z).square().sum() / N, teacher_width, width)
    torch.testing.assert_close(fit.student_RD, wanted, rtol=1e-6, atol=1e-8)
    assert fit.student_mean_D.count_nonzero() == 0
    torch.testing.assert_close(fit.teacher_mean_C, g.mean(0))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("width", "teacher_width"), CASES)
def test_with_an_intercept_it_is_the_minimum_over_both(basis, width, teacher_width):
    h, g, f = rows(width=width, teacher_width=teacher_width)
    fit = fitted(h, g, f, basis=basis)
    z = targets(fit, g)
    one = torch.ones(N, 1, dtype=torch.float64)
    wanted = minimised(lambda p: (torch.cat([h, one], dim=1) @ p.T - z).square().sum() / N, teacher_width, width + 1)
    torch.testing.assert_close(fit.student_RD, wanted[:, :-1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(-fit.student_RD @ fit.student_mean_D, wanted[:, -1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("scale", ["trace", "diagonal"])
def test_ridges_minimise_what_they_say(scale, intercept):
    h, g, _ = rows()
    h = h * torch.tensor([1.0, 30.0, 1.0, 0.1, 1.0], dtype=torch.float64)
    fit = fitted(h, g, intercept=intercept, ridge=0.3, ridge_scale=scale)
    z, x = targets(fit, g), h - h.mean(0) if intercept else h
    square_D = x.square().mean(0)
    weight_D = 0.3 * (square_D.mean().expand(D) if scale == "trace" else square_D)
    root_D = square_D.sqrt()
    scaled = minimised(
        lambda p: (x @ (p / root_D).T - z).square().sum() / N + (weight_D * (p / root_D).square()).sum(), C, D
    )
    torch.testing.assert_close(fit.student_RD, scaled / root_D, rtol=1e-6, atol=1e-9)
    assert (fit.student_RD - fitted(h, g, intercept=intercept).student_RD).abs().max() > 1e-2


def test_an_intercept_never_fits_worse():
    h, g, f = rows()
    for basis in BASES:
        both = [fitted(h, g, f, basis=basis, intercept=intercept) for intercept in (True, False)]
        squared = [((h - fit.student_mean_D) @ fit.student_RD.T - targets(fit, g)).square().sum() for fit in both]
        assert squared[0] < 0.99 * squared[1]


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_many_solutions_it_is_the_smallest(intercept, dtype):
    h, g, _ = rows(width=3)
    h = h @ torch.randn(3, 8, dtype=torch.float64)
    fit = fit_projectors(moments_of(h.to(dtype), g.to(dtype), dtype=dtype), basis="pca", intercept=intercept)
    z, x = targets(fit, g.to(dtype)), h - h.mean(0) if intercept else h
    wanted = torch.linalg.pinv(x, rcond=1e-5) @ z.double()
    descended = minimised(lambda p: (x @ p.T - z).square().sum() / N, C, 8)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(fit.student_RD.double(), wanted.T, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(descended, wanted.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_ridge_below_the_rounding_of_the_moments_predicts_the_same(seed):
    h, g, _ = rows(width=3, seed=seed)
    h = h @ torch.randn(3, 8, dtype=torch.float64)
    predicted = []
    for dtype in (torch.float64, torch.float32):
        fit = fit_projectors(moments_of(h.to(dtype), g.to(dtype), dtype=dtype), basis="pca", ridge=1e-12)
        predicted.append((h - fit.student_mean_D.double()) @ fit.student_RD.double().T)
    torch.testing.assert_close(*predicted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scale", ["trace", "diagonal"])
@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_few_rows_and_coordinates_that_never_move_do_no_harm(scale, ridge):
    h, g, f = rows(3, width=12)
    h[:, 4] = 2.0
    for basis in BASES:
        fit = fitted(h, g, f, basis=basis, ridge=ridge, ridge_scale=scale)
        assert all(tensor.isfinite().all() for tensor in vars(fit).values())
        assert fit.student_RD[:, 4].abs().max() < 1e-9
    nothing = fitted(h[:1], g[:1], f[:1], ridge=ridge, ridge_scale=scale)
    assert nothing.student_RD.count_nonzero() == 0


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_in_fp32_an_outlying_coordinate_does_not_hide_the_others(ridge):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2000, 256, generator=generator)
    g = h @ torch.randn(256, C, generator=generator) / 16 + 0.3 * torch.randn(2000, C, generator=generator)
    h[:, 7] = 200 * h[:, 7] + 600
    exact, rounded = (
        fit_projectors(moments_of(h, g, dtype=dtype), basis="pca", ridge=ridge).r_squared(C)
        for dtype in (torch.float64, torch.float32)
    )
    assert exact > 0.9
    assert rounded == pytest.approx(exact, abs=1e-3)


def test_pca_is_the_eigenvectors_of_the_teachers_covariance():
    h, g, _ = rows()
    fit = fitted(h, g)
    x = g - g.mean(0)
    covariance = sum(torch.outer(row, row) for row in x) / N
    assert_same_lines(fit.teacher_RC, eigenvectors(covariance))
    torch.testing.assert_close(fit.variance_R, torch.linalg.eigvalsh(covariance).flip(0))
    assert torch.equal(fit.teacher_RC.abs().argmax(1), fit.teacher_RC.argmax(1))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("intercept", [True, False])
def test_reduced_rank_spans_the_best_prediction_of_that_rank(rank, intercept):
    h, g, _ = rows()
    fit = fitted(h, g, basis="reduced_rank", intercept=intercept)
    x, y = (h - h.mean(0) if intercept else h), g - g.mean(0)
    predicted = x @ torch.linalg.lstsq(x, y).solution
    left, values, right = torch.linalg.svd(predicted, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    basis_RC = fit.teacher_RC[:rank]
    through_bridge = (h - fit.student_mean_D) @ fit.student_RD[:rank].T @ basis_RC
    torch.testing.assert_close(through_bridge, best, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(basis_RC.T @ basis_RC, right[:rank].T @ right[:rank], rtol=1e-7, atol=1e-9)
    pca = fitted(h, g, intercept=intercept)
    by_pca = (h - pca.student_mean_D) @ pca.student_RD[:rank].T @ pca.teacher_RC[:rank]
    assert (y - through_bridge).square().sum() < (y - by_pca).square().sum()


def test_predictive_gives_the_principal_components_of_what_the_state_says_of_the_output():
    h, g, f = rows()
    fit = fitted(h, g, f, basis="predictive")
    predicted = regressed(f, g)
    components = predicted @ main_directions(predicted).T
    assert_same_lines(targets(fit, g).T, components.T)
    torch.testing.assert_close(fit.variance_R, components.square().mean(0))
    other = fitted(h, g, f.flip(0), basis="predictive")
    assert (other.teacher_RC.abs() - fit.teacher_RC.abs()).abs().max() > 1e-2


def test_the_ridge_of_predictive_shrinks_the_outputs_regression_too():
    h, g, f = rows()
    fit = fitted(h, g, f, basis="predictive", ridge=0.5)
    x, y = g - g.mean(0), f - f.mean(0)
    weight = 0.5 * x.square().mean()
    map_CF = minimised(lambda p: (x @ p - y).square().sum() / N + weight * p.square().sum(), C, F)
    components = x @ map_CF @ main_directions(x @ map_CF).T
    torch.testing.assert_close(targets(fit, g).abs(), components.abs(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("basis", BASES)
def test_the_first_directions_are_the_fit_of_that_rank(basis):
    h, g, f = rows()
    fit = fitted(h, g, f, basis=basis)
    assert all(a >= b for a, b in zip(fit.variance_R, fit.variance_R[1:], strict=False)) or basis == "reduced_rank"
    x = h - h.mean(0)
    for rank in range(1, C + 1):
        z = (g - g.mean(0)) @ fit.teacher_RC[:rank].T
        alone = torch.linalg.lstsq(x, z).solution.T
        torch.testing.assert_close(fit.student_RD[:rank], alone, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("intercept", [True, False])
def test_r_squared_is_one_minus_residual_over_total(basis, ridge, intercept):
    h, g, f = rows()
    fit = fitted(h, g, f, basis=basis, ridge=ridge, intercept=intercept)
    student, teacher = (h - fit.student_mean_D) @ fit.student_RD.T, targets(fit, g)
    residual_R, variance_R = (student - teacher).square().mean(0), teacher.square().mean(0)
    torch.testing.assert_close(fit.residual_R, residual_R, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(fit.variance_R, variance_R, rtol=1e-9, atol=1e-10)
    for rank in range(1, C + 1):
        expected = 1 - residual_R[:rank].sum() / variance_R[:rank].sum()
        assert fit.r_squared(rank) == pytest.approx(expected.item(), rel=1e-9)
        assert 0 < fit.r_squared(rank) < 1


def test_a_fit_has_the_moments_precision_and_lies_in_order():
    h, g, f = rows()
    for dtype in (torch.float32, torch.float64):
        for basis in BASES:
            fit = fit_projectors(moments_of(h, g, f, dtype), basis=basis)
            assert all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in vars(fit).values())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_similarities_on_new_rows_are_those_of_each_rank(rank):
    teacher_width, wanted_ranks = 6, sorted({1, 2, 4, 6, rank})
    fits, new = {}, {}
    for layer in (2, 5):
        h, g, _ = rows(width=D, teacher_width=teacher_width, seed=layer)
        fits[layer] = fitted(h, g)
        new[layer] = rows(31, width=D, teacher_width=teacher_width, seed=10 + layer)[:2]
    check = HeldOut(fits, rank)
    for cut in (slice(0, 9), slice(9, 9), slice(9, 31)):
        for layer, (h, g) in new.items():
            check.add(layer, h[cut], g[cut])
    report = check.report(Ranks())
    for layer, (h, g) in new.items():
        fit, found = fits[layer], report[layer]
        assert list(found.cosine_by_rank) == list(found.r_squared_by_rank) == wanted_ranks
        for r in wanted_ranks:
            student = (h - fit.student_mean_D) @ fit.student_RD[:r].T
            teacher = (g - fit.teacher_mean_C) @ fit.teacher_RC[:r].T
            cosine = sum(x @ y / x.norm() / y.norm() for x, y in zip(student, teacher, strict=True)) / 31
            r_squared = 1 - (student - teacher).square().sum() / teacher.square().sum()
            assert found.cosine_by_rank[r] == pytest.approx(cosine.item(), rel=1e-9)
            assert found.r_squared_by_rank[r] == pytest.approx(r_squared.item(), rel=1e-9)
        assert found.cosine == found.cosine_by_rank[rank]
        assert found.held_out_r_squared == found.r_squared_by_rank[rank]
        assert found.r_squared == fit.r_squared(rank)
        assert found.spectrum == fit.variance_R.tolist()
    assert not math.isclose(report[2].cosine, report[5].cosine, rel_tol=1e-3)


def test_a_student_that_says_nothing_has_no_cosine_and_explains_nothing():
    h, g, _ = rows()
    fit = fitted(torch.ones_like(h), g)
    check = HeldOut({1: fit}, 2)
    check.add(1, torch.ones_like(h), g)
    report = check.report(Ranks())[1]
    assert report.cosine == 0
    assert report.held_out_r_squared == pytest.approx(0, abs=1e-12)
