"""A token loss of your own, written as a plain function of two log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from oprd_tune.config.components import find_function
from oprd_tune.errors import ConfigError
from oprd_tune.losses.token_loss import Comparison, DenseTokenLoss
from oprd_tune.metrics.step import Metrics

# log p and log q over the vocabulary, [T, V] each in fp32, to one loss a token, [T].
TokenError = Callable[[Tensor, Tensor], Tensor]


@dataclass(kw_only=True, eq=False)
class PerTokenLoss(DenseTokenLoss):
    """Any differentiable function of the student's and the teacher's log-probabilities.

    It runs on `chunk_tokens` tokens at a time, and autograd differentiates it there and then. So nothing of size
    tokens × vocabulary outlives a chunk, however many tokens there are.

    Attributes:
        per_token: a function of `log_p_TV`, the student's, and `log_q_TV`, the teacher's, that returns [T]; or its
            dotted path. Forward KL is `lambda log_p, log_q: (log_q.exp() * (log_q - log_p)).sum(-1)`.
        chunk_tokens: see `TokenLoss`; the function's own intermediates come on top of the usual three [chunk, V].

    Raises:
        ConfigError: if there is no such function; in the first step, if it returns something else.
    """

    per_token: TokenError | str
    chunk_tokens: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self._function: TokenError = find_function("loss.per_token", self.per_token)

    def working_bytes(self, vocabulary: int, width: int) -> int:
        """See `TokenLoss.working_bytes`; autograd is taken to keep four tensors of a chunk."""
        return super().working_bytes(vocabulary, width) + 4 * self.chunk_tokens * vocabulary * 4

    def objective(self, chunk: Comparison, metrics: Metrics) -> tuple[Tensor, Tensor]:
        """See `DenseTokenLoss.objective`.

        With g = ∂loss/∂log p, the gradient with respect to the logits is g − p · Σ_v g.
        """
        log_p_TV = chunk.log_p_TV
        log_q_TV = torch.sub(log_p_TV, chunk.log_ratio_TV, out=chunk.log_ratio_TV)
        with torch.enable_grad():
            leaf_TV = log_p_TV.requires_grad_()
            loss_T = self._function(leaf_TV, log_q_TV)
            if not isinstance(loss_T, Tensor) or loss_T.shape != leaf_TV.shape[:1]:
                got = tuple(loss_T.shape) if isinstance(loss_T, Tensor) else type(loss_T).__name__
                raise ConfigError(f"loss.per_token returned {got}; it must return one loss a token: ({len(leaf_TV)},)")
            if not loss_T.requires_grad:
                raise ConfigError("loss.per_token does not depend on the student's log-probabilities")
            total = loss_T.sum()
            (gradient_TV,) = torch.autograd.grad(total, leaf_TV)
        p_TV = log_p_TV.detach().exp_()
        return total.detach(), gradient_TV - p_TV.mul_(gradient_TV.sum(-1, keepdim=True))
