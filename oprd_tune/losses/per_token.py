"""A custom token loss, written as a plain function of both models' log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from oprd_tune.config.components import find_function
from oprd_tune.losses.streaming import check_one_a_token
from oprd_tune.losses.token_loss import Comparison, DenseTokenLoss, row_dot
from oprd_tune.metrics.step import Metrics

# Maps log p and log q over the vocabulary, each [T, V] in fp32, to one loss per token, [T].
TokenError = Callable[[Tensor, Tensor], Tensor]


@dataclass(kw_only=True, eq=False)
class PerTokenLoss(DenseTokenLoss):
    """Any differentiable function of the student's and the teacher's log-probabilities.

    The function runs on `chunk_tokens` tokens at a time, and autograd differentiates each chunk right away. So nothing
    of size tokens × vocabulary outlives its chunk.

    Attributes:
        per_token: a function of the student's `log_p_TV` and the teacher's `log_q_TV` that returns [T], or its dotted
            path. Forward KL is `lambda log_p, log_q: (log_q.exp() * (log_q - log_p)).sum(-1)`.
        chunk_tokens: see `TokenLoss`. The function's own intermediates add to the usual three [chunk, V] tensors.

    Raises:
        ConfigError: if there is no such function, or, in the first step, if its result is not [T] or does not depend on
            the student.
    """

    per_token: TokenError | str
    usual_chunk: ClassVar[int] = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self._function: TokenError = find_function("loss.per_token", self.per_token)

    def compile(self) -> None:
        """The function is left as it is, since it may do anything."""

    def working_bytes(self, vocabulary: int, width: int) -> int:
        """As in `TokenLoss`, plus p and four more [chunk, V] tensors that autograd is assumed to keep."""
        return super().working_bytes(vocabulary, width) + 5 * self.at_once * vocabulary * 4

    def objective(self, chunk: Comparison, metrics: Metrics) -> tuple[Tensor, Tensor]:
        """As in `DenseTokenLoss`. With g = ∂loss/∂log p, the gradient with respect to the logits is g − p · Σ_v g."""
        log_p_TV = chunk.log_p_TV
        p_TV = log_p_TV.exp()
        metrics.add_each("token/kl", row_dot(p_TV, chunk.log_ratio_TV))
        log_q_TV = torch.sub(log_p_TV, chunk.log_ratio_TV, out=chunk.log_ratio_TV)
        with torch.enable_grad():
            leaf_TV = log_p_TV.requires_grad_()
            loss_T = check_one_a_token("loss.per_token", self._function(leaf_TV, log_q_TV), leaf_TV)
            (gradient_TV,) = torch.autograd.grad(loss_T.sum(), leaf_TV)
        return loss_T.detach(), gradient_TV - p_TV.mul_(gradient_TV.sum(-1, keepdim=True))
