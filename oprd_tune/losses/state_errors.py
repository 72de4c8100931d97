"""Errors between the hidden states of student and teacher, and their gradients without autograd where they are known.

A loss on hidden states takes any function of two states. For the functions of this file the gradient has a closed form,
which takes fewer passes over the states than autograd; see `gradient_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from oprd_tune.losses.streaming import check_one_a_token

# Maps student and teacher states in fp32, each [T, D] (or [T, R] with a bridge), to one error per token, [T].
StateError = Callable[[Tensor, Tensor], Tensor]
_SMALLEST = 1e-12  # no state is divided by a smaller norm, as in `torch.nn.functional.normalize`


def squared_error(student_TD: Tensor, teacher_TD: Tensor) -> Tensor:
    """Per-token ‖h − g‖² / D, shape [T]."""
    return (student_TD - teacher_TD).square().mean(-1)


def unit_squared_error(student_TD: Tensor, teacher_TD: Tensor) -> Tensor:
    """Per-token error between unit vectors, (2 − 2 cos) / D, shape [T]."""
    return squared_error(F.normalize(student_TD, dim=-1), F.normalize(teacher_TD, dim=-1))


def summed_error(student_TR: Tensor, teacher_TR: Tensor) -> Tensor:
    """Per-token ‖z_S − z_T‖², shape [T]."""
    return (student_TR - teacher_TR).square().sum(-1)


def unit_summed_error(student_TR: Tensor, teacher_TR: Tensor) -> Tensor:
    """Per-token error between unit vectors, 2 − 2 cos, shape [T]."""
    return summed_error(F.normalize(student_TR, dim=-1), F.normalize(teacher_TR, dim=-1))


class StatePair:
    """What is compared at one layer, h and g, with the quantities that errors and metrics share.

    Args:
        student_TA: the student's states, or their projections, in at least fp32.
        teacher_TA: the teacher's, in any dtype. A narrower one is widened within each operation, without a copy.
    """

    def __init__(self, student_TA: Tensor, teacher_TA: Tensor) -> None:
        is_wider = torch.promote_types(student_TA.dtype, teacher_TA.dtype) != student_TA.dtype
        self.student_TA = student_TA
        self.teacher_TA = teacher_TA.to(student_TA.dtype) if is_wider else teacher_TA
        self._found: dict[str, Any] = {}  # what was computed; torch.compile cannot read `functools.cached_property`

    @property
    def difference_TA(self) -> Tensor:
        """h − g."""
        if "difference" not in self._found:
            self._found["difference"] = self.student_TA - self.teacher_TA
        return self._found["difference"]

    @property
    def square_T(self) -> Tensor:
        """‖h − g‖²."""
        if "square" not in self._found:
            self._found["square"] = torch.linalg.vector_norm(self.difference_TA, dim=-1).square_()
        return self._found["square"]

    @property
    def norms_T1(self) -> tuple[Tensor, Tensor]:
        """‖h‖ and ‖g‖, at least 1e-12."""
        if "norms" not in self._found:
            both, dtype = (self.student_TA, self.teacher_TA), self.student_TA.dtype
            norms_T1 = (torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype) for x in both)
            self._found["norms"] = tuple(norm_T1.clamp_(_SMALLEST) for norm_T1 in norms_T1)
        return self._found["norms"]

    @property
    def cosine_T(self) -> Tensor:
        """The cosine of the angle between h and g."""
        h_T1, g_T1 = self.norms_T1
        return (self.student_TA * self.teacher_TA).sum(-1).div_(h_T1.squeeze(-1)).div_(g_T1.squeeze(-1))


@dataclass(frozen=True)
class Gradient:
    """The errors [T], and the gradient of their sum with respect to the student's states: `weight` · `direction`.

    `weight` is a number, or one for each token, [T, 1]. A loss multiplies it by its own factors first.
    """

    error_T: Tensor
    direction_TA: Tensor
    weight: float | Tensor = 1.0


def compared(
    error: StateError,
    student_TA: Tensor,
    teacher_TA: Tensor,
    factor: float | Tensor,
    measured: bool,
    weight_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """What a loss needs of a pair of states: `factor` times the sum of errors, and its gradient in the student's dtype.

    Args:
        student_TA: the student's states or projections in the dtype of its layers; errors are computed in fp32 or more.
        measured: whether to return ‖h − g‖² and the cosine, each [T], as well.
        weight_T: weighs each token's error; None weighs all of them by 1.
    """
    wide = torch.promote_types(student_TA.dtype, torch.float32)
    pair = StatePair(student_TA.to(wide), teacher_TA)
    found = gradient_of(error)(pair)
    metrics = (pair.square_T, pair.cosine_T) if measured else None
    error_T, scale = found.error_T, found.weight * factor
    if weight_T is not None:
        error_T, scale = error_T * weight_T, weight_T.unsqueeze(-1) * scale
    gradient_TA = torch.mul(found.direction_TA, scale, out=torch.empty_like(student_TA))
    return error_T.sum() * factor, gradient_TA, metrics


def has_closed_form(error: StateError) -> bool:
    """Whether the gradient of an error is known, so that no autograd runs for it."""
    return any(known is error for known, _ in CLOSED_FORMS)


def gradient_of(error: StateError) -> Callable[[StatePair], Gradient]:
    """The function that evaluates an error with its gradient: in closed form if it is in `CLOSED_FORMS`."""
    return next((form for known, form in CLOSED_FORMS if known is error), partial(_by_autograd, error))


def _by_autograd(error: StateError, pair: StatePair) -> Gradient:
    with torch.enable_grad():
        student_TA = pair.student_TA.detach().requires_grad_()
        error_T = error(student_TA, pair.teacher_TA.to(student_TA.dtype))
        error_T = check_one_a_token("loss.error", error_T, student_TA)
        (direction_TA,) = torch.autograd.grad(error_T.sum(), student_TA)
    return Gradient(error_T.detach(), direction_TA)


def _squared(pair: StatePair, *, mean: bool) -> Gradient:
    """‖h − g‖² has the gradient 2 (h − g)."""
    count = pair.student_TA.shape[-1] if mean else 1
    return Gradient(pair.square_T / count, pair.difference_TA, 2 / count)


def _unit_squared(pair: StatePair, *, mean: bool) -> Gradient:
    """With unit vectors ĥ, ĝ and e = ĥ − ĝ, ‖e‖² has the gradient 2 (e − (e · ĥ) ĥ) / ‖h‖."""
    count = pair.student_TA.shape[-1] if mean else 1
    h_T1, g_T1 = pair.norms_T1
    unit_TA = pair.student_TA / h_T1
    away_TA = unit_TA - pair.teacher_TA / g_T1
    error_T = torch.linalg.vector_norm(away_TA, dim=-1).square_().div_(count)
    outward_T1 = (away_TA * unit_TA).sum(-1, keepdim=True)
    return Gradient(error_T, away_TA.addcmul_(unit_TA, outward_T1, value=-1), 2 / count / h_T1)


CLOSED_FORMS: list[tuple[StateError, Callable[[StatePair], Gradient]]] = [
    (squared_error, partial(_squared, mean=True)),
    (summed_error, partial(_squared, mean=False)),
    (unit_squared_error, partial(_unit_squared, mean=True)),
    (unit_summed_error, partial(_unit_squared, mean=False)),
]
