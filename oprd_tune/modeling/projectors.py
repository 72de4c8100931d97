"""From the moments of a layer pair to a bridge's projectors in closed form, and how well they do.

A bridge compares z_S = P_S (h − μ_S) with z_T = P_T (g − μ_T). The basis P_T says which of the teacher's directions
count; P_S is the linear regression of z_T on the student's states (Eq. 13 of arXiv 2606.06021, there by gradient
descent and without the intercept).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from oprd_tune.modeling.moments import PairMoments
from oprd_tune.ranks import Ranks

_NOISE = 32  # times the precision and the largest variance: more than sums of many batches came to, measured


@dataclass(frozen=True)
class LayerFit:
    """How well a layer pair's projections agree.

    Attributes:
        r_squared: on the fit's rows, along the R directions.
        held_out_r_squared: on rows that the fit has not seen.
        cosine: of z_S and z_T on those rows, mean.
        spectrum: the teacher's variance along each direction, up to full rank.
        cosine_by_rank: the same mean cosine if the bridge had another rank.
        r_squared_by_rank: the held-out R² likewise.
    """

    r_squared: float
    held_out_r_squared: float
    cosine: float
    spectrum: list[float]
    cosine_by_rank: dict[int, float]
    r_squared_by_rank: dict[int, float]


@dataclass(frozen=True)
class Projectors:
    """A layer pair's fit at full rank. Directions are sorted, so the first R make a bridge of rank R.

    Attributes:
        student_RD: P_S.
        student_mean_D: μ_S; zero without an intercept.
        teacher_RC: P_T.
        teacher_mean_C: μ_T.
        variance_R: of the teacher along each direction.
        residual_R: mean squared error of the regression along each direction, on the fit's own rows.
    """

    student_RD: Tensor
    student_mean_D: Tensor
    teacher_RC: Tensor
    teacher_mean_C: Tensor
    variance_R: Tensor
    residual_R: Tensor

    def r_squared(self, rank: int) -> float:
        """Share of the variance along the first `rank` directions that the student's states explain."""
        return 1 - (self.residual_R[:rank].sum() / self.variance_R[:rank].sum()).item()


@dataclass(frozen=True)
class _Known:
    """What a basis may be made of: covariances of the teacher's state, of its regression on the student's, and M."""

    gg_CC: Tensor
    predicted_CC: Tensor
    outcome_FC: Tensor | None


def _pca(known: _Known) -> Tensor:
    """Where the teacher varies most."""
    return _top_eigenvectors(known.gg_CC).T


def _reduced_rank(known: _Known) -> Tensor:
    """Where what the student can express of the teacher varies most."""
    return _top_eigenvectors(known.predicted_CC).T


def _predictive(known: _Known) -> Tensor:
    """What the teacher's output follows from, linearly: the main directions of f̂ = M g, where M regresses f on g."""
    assert known.outcome_FC is not None
    map_FC = known.outcome_FC
    return _top_eigenvectors(map_FC @ known.gg_CC @ map_FC.T).T @ map_FC


BASES: dict[str, Callable[[_Known], Tensor]] = {
    "pca": _pca,
    "reduced_rank": _reduced_rank,
    "predictive": _predictive,
}


def fit_projectors(
    moments: PairMoments,
    *,
    basis: str,
    intercept: bool = True,
    ridge: float = 0.0,
    ridge_scale: str = "trace",
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
) -> Projectors:
    """Solve a layer pair at full rank.

    Args:
        moments: merged.
        basis: one of `BASES`.
        intercept: centre the student's states too; without it, Eq. 13 itself.
        ridge: λ as a multiple of the scale below; 0 for none.
        ridge_scale: `trace` adds λ·tr(Σ)/D to each diagonal entry, `diagonal` a multiple λ of the entry itself.
        device: where to solve; what comes out is where the moments are, in their dtype.
    """
    hh_DD, gh_CD, gg_CC = (covariance.matrix_AB(device) for covariance in (moments.hh, moments.gh, moments.gg))
    mean_D = moments.hh.mean_A.to(device, torch.float64)
    if not intercept:
        hh_DD = hh_DD + mean_D.outer(mean_D)
        mean_D = torch.zeros_like(mean_D)
    map_CD = regression(gh_CD, hh_DD, ridge=ridge, ridge_scale=ridge_scale, precision=moments.hh.precision)
    outcome_FC = None
    if moments.fg is not None:
        outcome_FC = regression(moments.fg.matrix_AB(device), gg_CC, ridge=ridge, precision=moments.gg.precision)
    teacher_RC = BASES[basis](_Known(gg_CC, map_CD @ hh_DD @ map_CD.T, outcome_FC))
    student_RD = teacher_RC @ map_CD
    variance_R = _quadratic(teacher_RC, gg_CC, teacher_RC)
    explained_R = 2 * _quadratic(student_RD, gh_CD.T, teacher_RC) - _quadratic(student_RD, hh_DD, student_RD)
    fit = (student_RD, mean_D, teacher_RC, moments.gg.mean_A, variance_R, variance_R - explained_R)
    return Projectors(*(tensor.to(moments.hh.scatter_AB).contiguous() for tensor in fit))


def share_projectors(fit: Projectors | None, moments: PairMoments, owner: int, ranks: Ranks) -> Projectors:
    """Give every rank the fit that rank `owner` has made of merged moments."""
    student_D, teacher_C = moments.hh.mean_A, moments.gg.mean_A
    width = len(teacher_C)
    shapes = [(width, len(student_D)), (len(student_D),), (width, width), (width,), (width,), (width,)]
    tensors = [teacher_C.new_empty(shape) for shape in shapes] if fit is None else list(vars(fit).values())
    for tensor in tensors:
        ranks.share(tensor, owner)
    return Projectors(*tensors)


def regression(ba_BA: Tensor, aa_AA: Tensor, *, ridge: float, precision: float, ridge_scale: str = "trace") -> Tensor:
    """The linear map [B, A] of least squared error from a to b: Σ_ba (Σ_aa + λ)⁻¹.

    Directions in which a does not vary are left out, as gradient descent from zero would.

    Args:
        ba_BA: covariance of b and a.
        aa_AA: covariance of a.
        ridge: see `fit_projectors`.
        precision: relative error of Σ_aa; variances below it count as none.
        ridge_scale: see `fit_projectors`.
    """
    diagonal_A = aa_AA.diagonal()
    square_A = diagonal_A if ridge_scale == "diagonal" else diagonal_A.mean().expand_as(diagonal_A)
    scale_A = square_A.sqrt().where(square_A > 0, 1.0)
    scaled_AA = aa_AA / scale_A.outer(scale_A)
    scaled_AA.diagonal().add_(ridge)
    factor_AA, failed = torch.linalg.cholesky_ex(scaled_AA)
    if ridge > 0 and not failed:  # rounding beyond λ makes it fail
        return torch.cholesky_solve((ba_BA / scale_A).T, factor_AA).T / scale_A
    values_A, vectors_AA = torch.linalg.eigh(scaled_AA)
    kept_A = values_A > _NOISE * precision * values_A[-1]
    inverse_A = torch.where(kept_A, 1 / values_A.where(kept_A, 1.0), 0.0)
    return ((ba_BA / scale_A) @ (vectors_AA * inverse_A)) @ vectors_AA.T / scale_A


def _top_eigenvectors(symmetric_CC: Tensor) -> Tensor:
    """As columns, those of the largest eigenvalues first, each with its largest entry positive."""
    vectors_CR = torch.linalg.eigh((symmetric_CC + symmetric_CC.T) / 2).eigenvectors.flip(-1)
    largest_1R = vectors_CR.abs().argmax(0, keepdim=True)
    return vectors_CR * vectors_CR.gather(0, largest_1R).sign()


def _quadratic(left_RA: Tensor, middle_AB: Tensor, right_RB: Tensor) -> Tensor:
    """diag(left · middle · rightᵀ), [R]."""
    return ((left_RA @ middle_AB) * right_RB).sum(-1)


class HeldOut:
    """How well projectors of every rank agree on rows that they were not fitted on.

    Args:
        fits: full-rank projectors by student layer.
        rank: the bridge's own.
    """

    def __init__(self, fits: dict[int, Projectors], rank: int) -> None:
        self._fits, self._rank = fits, rank
        full = len(next(iter(fits.values())).variance_R)
        self._ranks = sorted({full, rank, *(2**power for power in range(full.bit_length()) if 2**power < full)})
        # Per rank: Σ cos, Σ squared error, Σ squared target; and the rows.
        self._sums = {layer: torch.zeros(3, len(self._ranks), dtype=torch.float64) for layer in fits}
        self._rows = dict.fromkeys(fits, 0)

    def add(self, layer: int, student_TD: Tensor, teacher_TC: Tensor) -> None:
        """Add rows of a layer pair."""
        fit = self._fits[layer]
        student_TR = (student_TD.to(fit.student_RD) - fit.student_mean_D) @ fit.student_RD.T
        teacher_TR = (teacher_TC.to(fit.teacher_RC) - fit.teacher_mean_C) @ fit.teacher_RC.T
        places_N = torch.tensor(self._ranks, device=student_TR.device) - 1

        def up_to_rank(value_TR: Tensor) -> Tensor:
            return value_TR.cumsum(-1)[:, places_N]

        square_TN = up_to_rank(teacher_TR.square())
        cosine_TN = up_to_rank(student_TR * teacher_TR) / (up_to_rank(student_TR.square()) * square_TN).sqrt()
        error_TN = up_to_rank((student_TR - teacher_TR).square())
        sums = torch.stack([value_TN.nan_to_num().sum(0).double() for value_TN in (cosine_TN, error_TN, square_TN)])
        self._sums[layer] += sums.cpu()
        self._rows[layer] += len(student_TD)

    def report(self, ranks: Ranks) -> dict[int, LayerFit]:
        """By student layer; the same on all ranks."""
        found = {}
        for layer, fit in self._fits.items():
            *sums, rows = ranks.total([*self._sums[layer].flatten().tolist(), self._rows[layer]])
            cosine, error, square = torch.tensor(sums, dtype=torch.float64).view(3, -1)
            cosine_by_rank = dict(zip(self._ranks, (cosine / rows).tolist(), strict=True))
            r_squared_by_rank = dict(zip(self._ranks, (1 - error / square).tolist(), strict=True))
            found[layer] = LayerFit(
                r_squared=fit.r_squared(self._rank),
                held_out_r_squared=r_squared_by_rank[self._rank],
                cosine=cosine_by_rank[self._rank],
                spectrum=fit.variance_R.tolist(),
                cosine_by_rank=cosine_by_rank,
                r_squared_by_rank=r_squared_by_rank,
            )
        return found
