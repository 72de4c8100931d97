"""A loss on selected rows of a layer's output, evaluated where the output is produced.

The sum and its gradient are formed together in the forward pass, in fp32. What survives until the backward pass is
one [T, D] gradient in the layer's own dtype: neither the fp32 copy nor the target lives on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def streamed_sum(state_BSD: Tensor, index_T: Tensor, sum_of_errors: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `sum_of_errors` to the selected rows of a hidden state, keeping only the rows' gradient.

    Args:
        state_BSD: a layer's output.
        index_T: unique positions in the flattened [B * S] grid; may be empty, which still yields a graph.
        sum_of_errors: maps the selected states [T, D], in fp32 (fp64 stays fp64), to a scalar sum. Any differentiable
            function of its argument; it runs once, in the forward pass.

    Returns:
        The scalar sum, differentiable with respect to `state_BSD` once.
    """
    total: Tensor = _StreamedSum.apply(state_BSD, index_T, sum_of_errors)
    return total


class _StreamedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state_BSD: Tensor, index_T: Tensor, sum_of_errors: Callable[[Tensor], Tensor]) -> Tensor:
        """Evaluate the sum and, if anybody will ask for it, its gradient."""
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
        """Scale the gradient and put it back into its rows."""
        gradient_TD, index_T = ctx.saved_tensors
        batch, length, width = ctx.shape_BSD
        gradient_BSD = gradient_TD.new_zeros(batch * length, width)
        gradient_BSD[index_T] = gradient_TD * upstream
        return gradient_BSD.view(ctx.shape_BSD), None, None
