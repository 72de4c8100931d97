"""Sums over tokens that need the LM head: value and gradients are formed in one pass over chunks of tokens.

A sum is linear in its terms, so both gradients are formed unscaled while the logits of a chunk exist, and multiplied by
the upstream factor in the backward pass. What waits for it is [T, D] for the state, and for the head either one [V, D]
buffer in fp32, or the states once more with the K factors of each. No [T, V] ever exists.
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
        """Add it, times a scalar, to the first rows of a buffer."""


@dataclass(frozen=True)
class DenseHeadGradient:
    """A gradient in every row, in at least fp32; used up when it is added."""

    gradient_VD: Tensor

    def add_to(self, grad_VD: Tensor, upstream: Tensor) -> None:
        """See `HeadGradient`."""
        for start, rows_RD in row_blocks(self.gradient_VD):
            grad_VD[start : start + len(rows_RD)] += rows_RD.mul_(upstream)


@dataclass(frozen=True)
class SparseHeadGradient:
    """A gradient in the rows of K tokens a state: factor_tk · state_t."""

    ids_TK: Tensor
    factor_TK: Tensor
    state_TD: Tensor

    def add_to(self, grad_VD: Tensor, upstream: Tensor) -> None:
        """See `HeadGradient`."""
        add_outer_rows(grad_VD, self.ids_TK, self.factor_TK * upstream, self.state_TD)


@dataclass(frozen=True)
class HeadSum:
    """A sum over tokens and its unscaled gradients; `head` may be None where the head does not train."""

    total: Tensor
    state_TD: Tensor
    head: HeadGradient | None


Evaluate = Callable[[Tensor], HeadSum]


def head_sum(state_BSD: Tensor, index_T: Tensor, weight_VD: Tensor, evaluate: Evaluate) -> Tensor:
    """Apply `evaluate` to the selected rows of the model's final state.

    Args:
        state_BSD: the final state, after the norm.
        index_T: unique positions in the flattened [B * S] grid; may be empty, which still yields a graph.
        weight_VD: the head's weight. If it trains, the backward pass adds its gradient to `weight_VD.grad` in place,
            past autograd: a tied embedding would otherwise wait for the rest of the model with a second [V, D] in hand.
            So `torch.autograd.grad` does not see this gradient; `backward` does.
        evaluate: called once, in the forward pass, with the selected states [T, D].

    Returns:
        The scalar sum, differentiable once.
    """
    total: Tensor = _HeadSum.apply(state_BSD, weight_VD, index_T, evaluate)
    return total


class _HeadSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state_BSD: Tensor, weight_VD: Tensor, index_T: Tensor, evaluate: Evaluate) -> Tensor:
        """Evaluate the sum and its gradients."""
        result = evaluate(state_BSD.detach().flatten(0, 1)[index_T])
        ctx.gradient, ctx.weight_VD = result, weight_VD
        ctx.index_T, ctx.shape_BSD = index_T, state_BSD.shape
        return result.total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Put the state's gradient into its rows, and the head's where it belongs."""
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
