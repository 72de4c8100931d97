"""Streamed covariances against all rows at once."""

import pytest
import torch

from oprd_tune.modeling.moments import Covariance, PairMoments
from oprd_tune.ranks import Ranks

A, B, CPU = 5, 3, torch.device("cpu")


def paired_rows(count, *, mean=2.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(count, A, generator=generator, dtype=torch.float64)
    b = a[:, :B] ** 2 + 2 * a[:, 1 : B + 1] + torch.randn(count, B, generator=generator, dtype=torch.float64)
    return (a + mean).to(dtype), (b - 3 * mean).to(dtype)


def accumulated(batches, dtype=torch.float64):
    covariance = Covariance(A, B, dtype=dtype, device=CPU)
    for a, b in batches:
        covariance.add(a, b)
    return covariance


def direct(a, b):
    """1/n · Σ (a − mean a)(b − mean b)ᵀ, one row after the other."""
    total = sum(torch.outer(x - a.mean(0), y - b.mean(0)) for x, y in zip(a, b, strict=True))
    return total / len(a)


@pytest.mark.parametrize("count", [1, 7, 50])
def test_one_batch_gives_count_means_and_covariance(count):
    a, b = paired_rows(count)
    covariance = accumulated([(a, b)])
    assert covariance.count == count
    torch.testing.assert_close(covariance.mean_A, a.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(covariance.mean_B, b.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(covariance.matrix_AB(CPU), direct(a, b), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cuts", [[1], [49], [1, 2, 3], [0, 7, 7, 30, 50], [10, 20, 30, 40], list(range(1, 50))])
@pytest.mark.parametrize("backwards", [False, True])
def test_neither_cuts_nor_order_nor_empty_batches_matter(cuts, backwards):
    a, b = paired_rows(50)
    batches = list(zip(a.tensor_split(cuts), b.tensor_split(cuts), strict=True))
    covariance = accumulated(batches[::-1] if backwards else batches)
    assert covariance.count == 50
    torch.testing.assert_close(covariance.mean_A, a.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(covariance.mean_B, b.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(covariance.matrix_AB(CPU), direct(a, b), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cuts", [[], [3, 10, 400], list(range(7, 600, 7))])
def test_in_fp32_a_mean_ten_thousand_deviations_away_costs_nothing(cuts):
    a, b = paired_rows(600, mean=1e4, dtype=torch.float32)
    covariance = accumulated(zip(a.tensor_split(cuts), b.tensor_split(cuts), strict=True), torch.float32)
    expected = direct(a.double(), b.double())
    torch.testing.assert_close(covariance.matrix_AB(CPU), expected, rtol=0, atol=5e-4 * expected.abs().max().item())
    torch.testing.assert_close(covariance.mean_A.double(), a.double().mean(0), rtol=3e-7, atol=0)


def test_sums_have_their_own_precision_whatever_the_rows_have():
    a, b = paired_rows(40, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        covariance = accumulated([(a[:13], b[:13]), (a[13:], b[13:])], dtype)
        assert covariance.precision == torch.finfo(dtype).eps
        expected = direct(a.double(), b.double())
        torch.testing.assert_close(covariance.matrix_AB(CPU), expected, rtol=100 * covariance.precision, atol=1e-6)
        assert covariance.matrix_AB(CPU).dtype == torch.float64


def test_what_has_seen_nothing_is_zero():
    covariance = accumulated([(torch.empty(0, A), torch.empty(0, B))])
    covariance.merge(Ranks())
    assert covariance.count == 0
    assert covariance.matrix_AB(CPU).count_nonzero() == covariance.mean_A.count_nonzero() == 0


def test_one_rank_alone_has_nothing_to_merge():
    a, b = paired_rows(20)
    covariance = accumulated([(a[:3], b[:3]), (a[3:], b[3:])])
    before = covariance.matrix_AB(CPU)
    covariance.merge(Ranks())
    torch.testing.assert_close(covariance.matrix_AB(CPU), before, rtol=1e-14, atol=0)
    assert covariance.count == 20


def test_a_pair_of_layers_has_four_covariances_each_the_right_way_round():
    h, g = paired_rows(30)
    f = paired_rows(30, seed=1)[0]
    moments = PairMoments(A, B, outcome_width=A, dtype=torch.float64, device=CPU)
    for rows in (slice(0, 4), slice(4, 30)):
        moments.add(h[rows], g[rows], f[rows])
    moments.merge(Ranks())
    for covariance, (x, y) in {moments.hh: (h, h), moments.gh: (g, h), moments.gg: (g, g), moments.fg: (f, g)}.items():
        assert covariance.count == 30
        torch.testing.assert_close(covariance.matrix_AB(CPU), direct(x, y), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("outcome_width", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_is_what_the_matrices_take(outcome_width, dtype):
    moments = PairMoments(A, B, outcome_width=outcome_width, dtype=dtype, device=CPU)
    held = [c.scatter_AB.nbytes for c in (moments.hh, moments.gh, moments.gg, moments.fg) if c is not None]
    assert PairMoments.bytes_of(A, B, outcome_width, dtype.itemsize) == sum(held)
