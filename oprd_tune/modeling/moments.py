"""Streaming counts, means and covariances of paired states. The states themselves are not stored."""

from __future__ import annotations

import torch
from torch import Tensor

from oprd_tune.ranks import Ranks


class Covariance:
    """Streaming covariance of paired vectors a and b. The result does not depend on how the rows are batched.

    Each batch is centred by its own mean before it is multiplied, and the means are merged with the exact correction.
    So a mean that is large compared with the deviations costs no precision.

    Args:
        dtype: dtype of sums and products, fp32 or fp64.
        device: device of the sums; added rows are moved there.

    Attributes:
        count: number of rows so far.
        scatter_AB: Σ (a − mean a)(b − mean b)ᵀ.
    """

    def __init__(self, width_a: int, width_b: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.count = 0
        self.mean_A = torch.zeros(width_a, dtype=dtype, device=device)
        self.mean_B = torch.zeros(width_b, dtype=dtype, device=device)
        self.scatter_AB = torch.zeros(width_a, width_b, dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, a_TA: Tensor, b_TB: Tensor) -> None:
        """Add paired rows, [T, A] and [T, B]."""
        if not (rows := len(a_TA)):
            return
        a_TA, b_TB = a_TA.to(self.scatter_AB), b_TB.to(self.scatter_AB)
        mean_A, mean_B = a_TA.mean(0), b_TB.mean(0)
        self.scatter_AB.addmm_((a_TA - mean_A).T, b_TB - mean_B)
        off_A, off_B = mean_A - self.mean_A, mean_B - self.mean_B
        total = self.count + rows
        self.scatter_AB.addr_(off_A, off_B, alpha=self.count * rows / total)
        self.mean_A += off_A * (rows / total)
        self.mean_B += off_B * (rows / total)
        self.count = total

    def merge(self, ranks: Ranks) -> None:
        """Combine the rows of all ranks. Every rank must call it, and all hold the same result afterwards."""
        own_N = torch.cat([torch.tensor([self.count]).to(self.mean_A), self.mean_A, self.mean_B])
        rows_WN = ranks.gather(own_N).to(own_N)
        share_W = rows_WN[:, 0] / rows_WN[:, 0].sum().clamp(min=1)
        _, mean_A, mean_B = (share_W @ rows_WN).split([1, len(self.mean_A), len(self.mean_B)])
        self.scatter_AB.addr_(self.mean_A - mean_A, self.mean_B - mean_B, alpha=self.count)
        ranks.add_up(self.scatter_AB)
        self.mean_A, self.mean_B = mean_A, mean_B
        self.count = int(rows_WN[:, 0].sum())

    @property
    def precision(self) -> float:
        """Relative rounding error of a sum."""
        return torch.finfo(self.scatter_AB.dtype).eps

    def matrix_AB(self, device: torch.device) -> Tensor:
        """The covariance, scatter divided by count, in fp64 on `device`."""
        return self.scatter_AB.to(device, torch.float64) / max(1, self.count)


class PairMoments:
    """The covariances from which a layer pair's projectors are computed. `dtype` and `device` are as in `Covariance`.

    h is the student's state and g the teacher's. f is the teacher's final state, of size `outcome_width`. Only the
    basis `predictive` needs it; for the others, `outcome_width` is None.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        outcome_width: int | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def covariance(a: int, b: int) -> Covariance:
            return Covariance(a, b, dtype=dtype, device=device)

        self.hh = covariance(student_width, student_width)
        self.gh = covariance(teacher_width, student_width)
        self.gg = covariance(teacher_width, teacher_width)
        self.fg = covariance(outcome_width, teacher_width) if outcome_width else None

    def add(self, student_TD: Tensor, teacher_TC: Tensor, outcome_TF: Tensor | None = None) -> None:
        """Add paired states, with the teacher's final states for the basis `predictive`."""
        self.hh.add(student_TD, student_TD)
        self.gh.add(teacher_TC, student_TD)
        self.gg.add(teacher_TC, teacher_TC)
        if self.fg is not None:
            assert outcome_TF is not None
            self.fg.add(outcome_TF, teacher_TC)

    def merge(self, ranks: Ranks) -> None:
        for covariance in (self.hh, self.gh, self.gg, self.fg):
            if covariance is not None:
                covariance.merge(ranks)

    @staticmethod
    def bytes_of(student_width: int, teacher_width: int, outcome_width: int | None, itemsize: int) -> int:
        """Memory of one pair's covariances, in bytes."""
        outcome = (outcome_width or 0) * teacher_width
        return (student_width**2 + student_width * teacher_width + teacher_width**2 + outcome) * itemsize
