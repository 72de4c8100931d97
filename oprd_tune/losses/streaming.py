"""A loss on selected rows of a layer's output, evaluated as soon as the layer has produced it.

The forward pass forms both the sum and its gradient, in fp32. Only the gradient with respect to what is compared waits
for the backward pass: [T, D] in the layer's own dtype or, through a bridge, [T, R]. From there to the layer, the
backward pass needs no more than the bridge and the index of the rows. The fp32 copy of the state and the target are
freed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oprd_tune.errors import ConfigError

# From what is compared, [T, A], to the scalar sum over tokens and its gradient in the dtype of its argument.
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


def selected_rows(state_BSD: Tensor, index_T: Tensor) -> Tensor:
    """The selected rows of a layer's output, [T, D] in its dtype; differentiable. Only the index is kept for that.

    Args:
        index_T: unique positions in the flattened [B * S] grid. It may be empty; the result still has a graph.
    """
    rows_TD: Tensor = _SelectedRows.apply(state_BSD, index_T)
    return rows_TD


def evaluated_sum(compared_TA: Tensor, evaluate: Evaluate) -> Tensor:
    """The scalar sum that `evaluate` returns, which runs once, in the forward pass; differentiable once."""
    total: Tensor = _EvaluatedSum.apply(compared_TA, evaluate)
    return total


def streamed_sum(state_BSD: Tensor, index_T: Tensor, sum_of_errors: Callable[[Tensor], Tensor]) -> Tensor:
    """The scalar `sum_of_errors` of the selected rows; differentiable once with respect to `state_BSD`.

    Args:
        state_BSD: a layer's output.
        index_T: as in `selected_rows`.
        sum_of_errors: any differentiable function from the selected states [T, D], in fp32 (fp64 stays fp64), to a
            scalar. It runs once, in the forward pass.
    """

    def evaluate(rows_TD: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf_TD = widened(rows_TD).detach().requires_grad_()
            total = sum_of_errors(leaf_TD)
            (gradient_TD,) = torch.autograd.grad(total, leaf_TD)
        return total.detach(), gradient_TD.to(rows_TD.dtype)

    return evaluated_sum(selected_rows(state_BSD, index_T), evaluate)


def widened(state_TA: Tensor) -> Tensor:
    """In fp32; fp64 stays fp64."""
    return state_TA.to(torch.promote_types(state_TA.dtype, torch.float32))


def check_one_a_token(name: str, error: object, student_TA: Tensor) -> Tensor:
    """Return what a user's function made of `student_TA`, or raise ConfigError unless that is one value a token.

    `name` is the function's config key, for the message.
    """
    if not isinstance(error, Tensor) or error.shape != student_TA.shape[:1]:
        got = tuple(error.shape) if isinstance(error, Tensor) else type(error).__name__
        raise ConfigError(f"{name} returned {got}; it must return one value a token: ({len(student_TA)},)")
    if student_TA.requires_grad and not error.requires_grad:
        raise ConfigError(f"{name} returned something that does not depend on the student, so nothing can be learned")
    return error


class _SelectedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state_BSD: Tensor, index_T: Tensor) -> Tensor:
        ctx.save_for_backward(index_T)
        ctx.shape_BSD = state_BSD.shape
        return state_BSD.flatten(0, 1)[index_T]

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None]:
        (index_T,) = ctx.saved_tensors
        batch, length, width = ctx.shape_BSD
        gradient_BSD = gradient_TD.new_zeros(batch * length, width)
        gradient_BSD[index_T] = gradient_TD
        return gradient_BSD.view(ctx.shape_BSD), None


class _EvaluatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compared_TA: Tensor, evaluate: Evaluate) -> Tensor:
        total, gradient_TA = evaluate(compared_TA.detach())
        ctx.save_for_backward(gradient_TA)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient_TA,) = ctx.saved_tensors
        return gradient_TA * upstream, None
