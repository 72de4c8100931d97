"""Sums over tokens that need the LM head. One pass over chunks of tokens forms both the sum and its gradients.

The gradients of state and head are formed unscaled while the logits of a chunk exist. The backward pass multiplies them
by the upstream factor. Until then they take [T, D] for the state and, for the head, either one [V, D] buffer in fp32 or
the states once more with K factors each. No [T, V] ever exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from oprd_tune.modeling.heads import add_outer_rows, row_blocks


class HeadGradient(Protocol):
    """The unscaled gradient of a sum with respect to the head's weight."""

    def add_to(self, grad_VD: Tensor, upstream: Tensor) -> None:
        """Add the gradient, times the scalar `upstream`, to the first rows of `grad_VD`. Called once."""


@dataclass(frozen=True)
class DenseHeadGradient:
    """A gradient in every row of the head, in at least fp32. `add_to` overwrites it."""

    gradient_VD: Tensor

    def add_to(self, grad_VD: Tensor, upstream: Tensor) -> None:
        for start, rows_RD in row_blocks(self.gradient_VD):
            grad_VD[start : start + len(rows_RD)] += rows_RD.mul_(upstream)


@dataclass(frozen=True)
class SparseHeadGradient:
    """A gradient in the rows of K tokens per state: row ids_tk receives factor_tk · state_t."""

    ids_TK: Tensor
    factor_TK: Tensor
    state_TD: Tensor

    def add_to(self, grad_VD: Tensor, upstream: Tensor) -> None:
        add_outer_rows(grad_VD, self.ids_TK, self.factor_TK * upstream, self.state_TD)


@dataclass(frozen=True)
class HeadSum:
    """A sum over tokens with its unscaled gradients. `head` may be None if the head does not train."""

    total: Tensor
    state_TD: Tensor
    head: HeadGradient | None


Evaluate = Callable[[Tensor], HeadSum]


def head_sum(state_BSD: Tensor, index_T: Tensor, weight_VD: Tensor, evaluate: Evaluate) -> Tensor:
    """The scalar sum of `evaluate` on the selected rows of the model's final state; differentiable once.

    Args:
        state_BSD: the final state, after the norm.
        index_T: unique positions in the flattened [B * S] grid. It may be empty; the result still has a graph.
        weight_VD: the head's weight. If it trains, the backward pass adds its gradient directly to `weight_VD.grad`, so
            `torch.autograd.grad` does not return it. Going through autograd would keep a second [V, D] for a tied
            embedding until the backward pass has gone through the whole model.
        evaluate: called once, in the forward pass, with the selected states [T, D].
    """
    total: Tensor = _HeadSum.apply(state_BSD, weight_VD, index_T, evaluate)
    return total


class _HeadSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state_BSD: Tensor, weight_VD: Tensor, index_T: Tensor, evaluate: Evaluate) -> Tensor:
        result = evaluate(state_BSD.detach().flatten(0, 1)[index_T])
        ctx.gradient, ctx.weight_VD = result, weight_VD
        ctx.index_T, ctx.shape_BSD = index_T, state_BSD.shape
        return result.total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Scatter the state's gradient into its rows and add the head's gradient to `weight_VD.grad`."""
        gradient, weight_VD = ctx.gradient, ctx.weight_VD
        ctx.gradient = ctx.weight_VD = None  # the buffers must not outlive this call
        if ctx.needs_input_grad[1]:
            if weight_VD.grad is None:
                weight_VD.grad = torch.zeros_like(weight_VD)
            gradient.head.add_to(weight_VD.grad, upstream)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        batch, length, width = ctx.shape_BSD
        gradient_BSD = gradient.state_TD.new_zeros(batch * length, width)
        gradient_BSD[ctx.index_T] = gradient.state_TD.mul_(upstream)
        return gradient_BSD.view(ctx.shape_BSD), None, None, None
