"""A loss on selected rows of a layer's output, evaluated as soon as the layer has produced it.

The forward pass forms both the sum and its gradient, in fp32. Only the [T, D] gradient, in the layer's own dtype, is
kept until the backward pass; the fp32 copy of the state and the target are freed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oprd_tune.errors import ConfigError


def streamed_sum(state_BSD: Tensor, index_T: Tensor, sum_of_errors: Callable[[Tensor], Tensor]) -> Tensor:
    """The scalar `sum_of_errors` of the selected rows; differentiable once with respect to `state_BSD`.

    Args:
        state_BSD: a layer's output.
        index_T: unique positions in the flattened [B * S] grid. It may be empty; the result still has a graph.
        sum_of_errors: any differentiable function from the selected states [T, D], in fp32 (fp64 stays fp64), to a
            scalar. It runs once, in the forward pass.
    """
    total: Tensor = _StreamedSum.apply(state_BSD, index_T, sum_of_errors)
    return total


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


class _StreamedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state_BSD: Tensor, index_T: Tensor, sum_of_errors: Callable[[Tensor], Tensor]) -> Tensor:
        """Evaluate the sum and, if the state needs one, its gradient."""
        selected_TD = state_BSD.detach().flatten(0, 1)[index_T]
        selected_TD = selected_TD.to(torch.promote_types(selected_TD.dtype, torch.float32))
        if not ctx.needs_input_grad[0]:
            return sum_of_errors(selected_TD)
        with torch.enable_grad():
            selected_TD.requires_grad_()
            total = sum_of_errors(selected_TD)
            (gradient_TD,) = torch.autograd.grad(total, selected_TD)
        ctx.save_for_backward(gradient_TD.to(state_BSD.dtype), index_T)
        ctx.shape_BSD = state_BSD.shape
        return total.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        gradient_TD, index_T = ctx.saved_tensors
        batch, length, width = ctx.shape_BSD
        gradient_BSD = gradient_TD.new_zeros(batch * length, width)
        gradient_BSD[index_T] = gradient_TD * upstream
        return gradient_BSD.view(ctx.shape_BSD), None, None
