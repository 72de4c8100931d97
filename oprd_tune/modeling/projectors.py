"""The projectors of a bridge, computed in closed form from a layer pair's moments, and measures of their fit.

A bridge compares z_S = P_S (h − μ_S) with z_T = P_T (g − μ_T). The basis P_T selects directions of the teacher's
states. P_S is the linear regression of z_T on the student's states (Eq. 13 of arXiv 2606.06021, which uses gradient
descent and no intercept).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from oprd_tune.modeling.moments import PairMoments
from oprd_tune.ranks import Ranks

_NOISE = 32  # times precision and largest variance: below this, a variance is rounding noise (measured noise is less)


@dataclass(frozen=True)
class LayerFit:
    """How well a layer pair's projections agree.

    Attributes:
        r_squared: R² along the bridge's R directions on the rows of the fit.
        held_out_r_squared: the same on rows that the fit has not seen.
        cosine: mean cosine of z_S and z_T on those held-out rows.
        spectrum: the teacher's variance along each direction, up to full rank.
        cosine_by_rank: the mean cosine that bridges of other ranks would have.
        r_squared_by_rank: the held-out R² that bridges of other ranks would have.
    """

    r_squared: float
    held_out_r_squared: float
    cosine: float
    spectrum: list[float]
    cosine_by_rank: dict[int, float]
    r_squared_by_rank: dict[int, float]


@dataclass(frozen=True)
class Projectors:
    """A layer pair's P_S, μ_S, P_T and μ_T at full rank. Directions are sorted: the first R make a bridge of rank R.

    Attributes:
        student_mean_D: μ_S; zero without an intercept.
        variance_R: variance of the teacher's states along each direction.
        residual_R: mean squared error of the regression along each direction, on the rows of the fit.
    """

    student_RD: Tensor
    student_mean_D: Tensor
    teacher_RC: Tensor
    teacher_mean_C: Tensor
    variance_R: Tensor
    residual_R: Tensor

    def r_squared(self, rank: int) -> float:
        """Share of the teacher's variance along the first `rank` directions that the student's states explain."""
        return 1 - (self.residual_R[:rank].sum() / self.variance_R[:rank].sum()).item()


@dataclass(frozen=True)
class _Known:
    """Inputs of a basis: covariances of the teacher's state g and of its prediction from the student, and M."""

    gg_CC: Tensor
    predicted_CC: Tensor
    outcome_FC: Tensor | None


def _pca(known: _Known) -> Tensor:
    """The directions in which the teacher's states vary most."""
    return _top_eigenvectors(known.gg_CC).T


def _reduced_rank(known: _Known) -> Tensor:
    """The directions in which the linear prediction of the teacher's states from the student's varies most."""
    return _top_eigenvectors(known.predicted_CC).T


def _predictive(known: _Known) -> Tensor:
    """The directions that predict the final state f: the main directions of f̂ = M g, where M regresses f on g."""
    map_FC = known.outcome_FC
    assert map_FC is not None
    return _top_eigenvectors(map_FC @ known.gg_CC @ map_FC.T).T @ map_FC


BASES: dict[str, Callable[[_Known], Tensor]] = {"pca": _pca, "reduced_rank": _reduced_rank, "predictive": _predictive}


def fit_projectors(
    moments: PairMoments,
    *,
    basis: str,
    intercept: bool = True,
    ridge: float = 0.0,
    ridge_scale: str = "trace",
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
) -> Projectors:
    """Solve for a layer pair's projectors at full rank, in fp64. They get the device and dtype of the moments.

    Args:
        moments: moments that are merged over ranks.
        basis: one of `BASES`.
        intercept: centre the student's states too. False is Eq. 13 itself.
        ridge: the factor λ; 0 for no regularisation.
        ridge_scale: `trace` adds λ·tr(Σ)/D to each diagonal entry; `diagonal` adds λ times the entry itself.
        device: where to solve.
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
    """Send the fit of rank `owner` to every rank. The other ranks pass None as `fit`."""
    student_D, teacher_C = moments.hh.mean_A, moments.gg.mean_A
    width = len(teacher_C)
    shapes = [(width, len(student_D)), (len(student_D),), (width, width), (width,), (width,), (width,)]
    tensors = [teacher_C.new_empty(shape) for shape in shapes] if fit is None else list(vars(fit).values())
    for tensor in tensors:
        ranks.share(tensor, owner)
    return Projectors(*tensors)


def regression(ba_BA: Tensor, aa_AA: Tensor, *, ridge: float, precision: float, ridge_scale: str = "trace") -> Tensor:
    """The linear map [B, A] of least squared error from a to b: Σ_ba (Σ_aa + λ)⁻¹.

    Directions in which a does not vary map to zero, as with gradient descent from zero.

    Args:
        ba_BA: covariance of b and a.
        ridge: see `fit_projectors`, as for `ridge_scale`.
        precision: relative rounding error of Σ_aa; it decides which variances count as zero.
    """
    diagonal_A = aa_AA.diagonal()
    square_A = diagonal_A if ridge_scale == "diagonal" else diagonal_A.mean().expand_as(diagonal_A)
    scale_A = square_A.sqrt().where(square_A > 0, 1.0)
    scaled_AA = aa_AA / scale_A.outer(scale_A)
    scaled_AA.diagonal().add_(ridge)
    factor_AA, failed = torch.linalg.cholesky_ex(scaled_AA)
    if ridge > 0 and not failed:  # it fails if rounding errors exceed λ
        return torch.cholesky_solve((ba_BA / scale_A).T, factor_AA).T / scale_A
    values_A, vectors_AA = torch.linalg.eigh(scaled_AA)
    kept_A = values_A > _NOISE * precision * values_A[-1]
    inverse_A = torch.where(kept_A, 1 / values_A.where(kept_A, 1.0), 0.0)
    return ((ba_BA / scale_A) @ (vectors_AA * inverse_A)) @ vectors_AA.T / scale_A


def _top_eigenvectors(symmetric_CC: Tensor) -> Tensor:
    """Eigenvectors as columns, largest eigenvalue first. The largest entry of each is positive."""
    vectors_CR = torch.linalg.eigh((symmetric_CC + symmetric_CC.T) / 2).eigenvectors.flip(-1)
    largest_1R = vectors_CR.abs().argmax(0, keepdim=True)
    return vectors_CR * vectors_CR.gather(0, largest_1R).sign()


def _quadratic(left_RA: Tensor, middle_AB: Tensor, right_RB: Tensor) -> Tensor:
    """diag(left · middle · rightᵀ), [R]."""
    return ((left_RA @ middle_AB) * right_RB).sum(-1)


class HeldOut:
    """Measures how well projections agree on held-out rows, for bridges of several ranks up to full rank.

    Args:
        fits: full-rank projectors by student layer.
        rank: the bridge's rank.
    """

    def __init__(self, fits: dict[int, Projectors], rank: int) -> None:
        self._fits, self._rank = fits, rank
        full = len(next(iter(fits.values())).variance_R)
        self._ranks = sorted({full, rank, *(2**power for power in range(full.bit_length()) if 2**power < full)})
        # For each rank: Σ cosine, Σ squared error and Σ squared target over rows.
        self._sums = {layer: torch.zeros(3, len(self._ranks), dtype=torch.float64) for layer in fits}
        self._rows = dict.fromkeys(fits, 0)

    def add(self, layer: int, student_TD: Tensor, teacher_TC: Tensor) -> None:
        """Add rows of states of a layer pair."""
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
        """The fit by student layer, over the rows of all ranks. Every rank must call it and gets the same."""
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
