"""Divergences over the full vocabulary beside the reverse KL: forward, mixed, Jensen-Shannon, and top-k with a tail.

Each is a sum over the vocabulary of entries d_v, with the derivative g_v = ∂d_v/∂log p_v known. With logits z, the
gradient is g_v − p_v · Σ_u g_u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from oprd_tune.config.checks import check_share, check_whole
from oprd_tune.errors import ConfigError
from oprd_tune.losses.entry_divergence import EntryDivergence
from oprd_tune.losses.token_loss import Comparison, DenseTokenLoss, row_dot
from oprd_tune.losses.topk_kl import check_k
from oprd_tune.metrics.step import Metrics
from oprd_tune.protocols import RolloutEngine


class ForwardKL(EntryDivergence):
    """KL(q‖p): d = q (log q − log p), g = −q. It covers what the teacher says, also where the student does not.

    Without a limit the gradient is p − q, that of cross-entropy with the teacher's distribution as target.
    """

    def entries(self, p_TV: Tensor, log_q_TV: Tensor, log_ratio_TV: Tensor) -> tuple[Tensor, Tensor]:
        q_TV = log_q_TV.exp_()
        return log_ratio_TV.mul_(q_TV).neg_(), q_TV.neg_()


@dataclass(kw_only=True, eq=False)
class MixedKL(EntryDivergence):
    """w · KL(q‖p) + (1 − w) · KL(p‖q), both over the full vocabulary.

    Attributes:
        forward_weight: w, between 0 and 1.
    """

    forward_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("loss.forward_weight", self.forward_weight)

    def entries(self, p_TV: Tensor, log_q_TV: Tensor, log_ratio_TV: Tensor) -> tuple[Tensor, Tensor]:
        """d = ((1 − w) p − w q) log(p/q), g = (1 − w) p (log(p/q) + 1) − w q."""
        weight, q_TV = self.forward_weight, log_q_TV.exp_()
        factor_TV = torch.lerp(p_TV, -q_TV, weight)
        d_TV = factor_TV * log_ratio_TV
        g_TV = log_ratio_TV.add_(1).mul_(p_TV).mul_(1 - weight).sub_(q_TV, alpha=weight)
        return d_TV, g_TV


@dataclass(kw_only=True, eq=False)
class GeneralisedJSD(EntryDivergence):
    """JSD(β) = β KL(q‖m) + (1 − β) KL(p‖m) with m = β q + (1 − β) p (GKD, Agarwal et al. 2024).

    With the usual convention, β = 0 is the forward KL(q‖p) and β = 1 the reverse KL(p‖q). These are the limits of
    JSD(β)/β and JSD(β)/(1 − β), not of JSD(β), which is 0 at both ends; so the gradient of a β near an end is small.

    Attributes:
        beta: β, between 0 and 1.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("loss.beta", self.beta)
        self._end = MixedKL(forward_weight=1 - self.beta) if self.beta in (0, 1) else None

    def entries(self, p_TV: Tensor, log_q_TV: Tensor, log_ratio_TV: Tensor) -> tuple[Tensor, Tensor]:
        """With r = log(p/m): d = β q (r − log(p/q)) + (1 − β) p r, and g = (1 − β) p r."""
        if self._end is not None:
            return self._end.entries(p_TV, log_q_TV, log_ratio_TV)
        beta = self.beta
        # m/p = (1 − β) + β q/p, as a sum of exponentials, which cannot overflow
        scaled_TV = math.log(beta) - log_ratio_TV
        r_TV = torch.logaddexp(scaled_TV, scaled_TV.new_tensor(math.log1p(-beta)), out=scaled_TV).neg_()
        g_TV = (p_TV * r_TV).mul_(1 - beta)
        d_TV = r_TV.sub_(log_ratio_TV).mul_(log_q_TV.exp_()).mul_(beta).add_(g_TV)
        return d_TV, g_TV


@dataclass(kw_only=True, eq=False)
class TailedTopKKL(DenseTokenLoss):
    """A KL over K + 1 outcomes: K tokens, and the tail of all others as one. Mass cannot leak into the tail unseen.

    Attributes:
        k: how many tokens stand for themselves.
        support: whose most probable ones: `student` or `teacher`.
        direction: `reverse` is KL(p‖q), `forward` is KL(q‖p).

    Raises:
        ConfigError: for a k below 1, an unknown support or direction.
    """

    k: int = 16
    support: str = "student"
    direction: str = "reverse"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("loss.k", self.k)
        for name, allowed in (("support", ("student", "teacher")), ("direction", ("reverse", "forward"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"loss.{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")

    def check(self, vocabulary: int, engine: RolloutEngine) -> None:
        check_k("k", self.k, vocabulary)

    def working_bytes(self, vocabulary: int, width: int) -> int:
        """As in `DenseTokenLoss`, with two more [chunk, V] tensors."""
        return super().working_bytes(vocabulary, width) + 2 * self.at_once * vocabulary * 4

    def objective(self, chunk: Comparison, metrics: Metrics) -> tuple[Tensor, Tensor]:
        """As in `DenseTokenLoss`.

        With outcome probabilities P, Q, the gradient of the reverse KL is p_v (log P/Q − KL), and that of the forward
        one p_v − p_v Q/P, each with the outcome of v.
        """
        log_q_TV = torch.sub(chunk.log_p_TV, chunk.log_ratio_TV)
        chosen_TV = chunk.log_p_TV if self.support == "student" else log_q_TV
        ids_TK = chosen_TV.topk(self.k, dim=-1).indices
        p_TV, q_TV = chunk.log_p_TV.exp_(), log_q_TV.exp_()
        metrics.add_each("token/kl", row_dot(p_TV, chunk.log_ratio_TV))
        tail_p_T1, tail_q_T1 = _outside(p_TV, ids_TK), _outside(q_TV, ids_TK)
        metrics.add_each("token/student_mass", 1 - tail_p_T1.squeeze(-1))
        metrics.add_each("token/teacher_mass", 1 - tail_q_T1.squeeze(-1))
        tail_ratio_T1 = tail_p_T1.log() - tail_q_T1.log()
        ratio_TK, p_TK, q_TK = chunk.log_ratio_TV.gather(1, ids_TK), p_TV.gather(1, ids_TK), q_TV.gather(1, ids_TK)
        if self.direction == "reverse":
            kl_T1 = (p_TK * ratio_TK).sum(-1, keepdim=True) + tail_p_T1 * tail_ratio_T1
            gradient_TK, factor_T1 = p_TK * (ratio_TK - kl_T1), tail_ratio_T1 - kl_T1
        else:
            kl_T1 = -(q_TK * ratio_TK).sum(-1, keepdim=True) - tail_q_T1 * tail_ratio_T1
            gradient_TK, factor_T1 = p_TK - q_TK, 1 - tail_q_T1 / tail_p_T1
        return kl_T1.squeeze(-1), p_TV.mul_(factor_T1).scatter_(1, ids_TK, gradient_TK)


def _outside(p_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """The total probability of all other tokens, [T, 1]: summed up, since 1 − P(𝒮) would be rounding alone."""
    tail_T1 = p_TV.scatter(1, ids_TK, 0).sum(-1, keepdim=True)
    return tail_T1.clamp_(min=torch.finfo(p_TV.dtype).tiny)
