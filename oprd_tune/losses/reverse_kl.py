"""Reverse KL over the full vocabulary, and its one-sample estimate (Eqs. 4 and 3 of arXiv 2606.06021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from oprd_tune.config.checks import check_positive
from oprd_tune.errors import ConfigError
from oprd_tune.losses.entry_divergence import EntryDivergence
from oprd_tune.losses.token_loss import Comparison, DenseTokenLoss, row_dot
from oprd_tune.metrics.step import Metrics
from oprd_tune.protocols import RolloutEngine
from oprd_tune.selection import ResponseTokens


class FullReverseKL(EntryDivergence):
    """Exact KL(p‖q) over the whole vocabulary (Eq. 4): d = p log(p/q), g = p (log(p/q) + 1).

    Without a limit, ∂KL/∂logit_v = p_v · (log p_v − log q_v − KL), formed in place.
    """

    usual_chunk: ClassVar[int] = 512

    def working_bytes(self, vocabulary: int, width: int) -> int:
        """With a limit as in `EntryDivergence`, else as in `DenseTokenLoss`."""
        kind = DenseTokenLoss if self.entry_clip is None else EntryDivergence
        return kind.working_bytes(self, vocabulary, width)

    def entries(self, p_TV: Tensor, log_q_TV: Tensor, log_ratio_TV: Tensor) -> tuple[Tensor, Tensor]:
        return p_TV * log_ratio_TV, log_ratio_TV.add_(1).mul_(p_TV)

    def objective(self, chunk: Comparison, metrics: Metrics) -> tuple[Tensor, Tensor]:
        if self.entry_clip is not None:
            return super().objective(chunk, metrics)
        kl_T, p_TV = exact_kl(chunk, metrics)
        return kl_T, chunk.log_ratio_TV.sub_(kl_T.unsqueeze(-1)).mul_(p_TV)


@dataclass(kw_only=True, eq=False)
class ScoreFunctionLoss(DenseTokenLoss):
    """Base of losses −w · A · log p(y) of the sampled token y, whose factors carry no gradient.

    The estimate is unbiased only if y was sampled from p, so `student_temperature` must equal the sampler's.

    Attributes:
        importance_ratio_cap: weights each token by w = min(p(y)/μ(y), importance_ratio_cap) to correct for a sampler
            that is another engine; μ is the probability that the sampler reported. None means w = 1.
    """

    importance_ratio_cap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs_samples = True
        if self.importance_ratio_cap is not None:
            check_positive("loss.importance_ratio_cap", self.importance_ratio_cap)

    def check(self, vocabulary: int, engine: RolloutEngine) -> None:
        """As in `TokenLoss`: temperatures must be equal, a cap needs another engine at 1, and older responses a cap."""
        if self.student_temperature != engine.temperature:
            raise ConfigError(
                f"loss.student_temperature is {self.student_temperature} and rollout.temperature "
                f"{engine.temperature}: {type(self).__name__} is unbiased only where they are equal"
            )
        if self.importance_ratio_cap is None:
            if getattr(engine, "ahead", 0):
                raise ConfigError(
                    "rollout.ahead is 1, so responses are one step old: set loss.importance_ratio_cap, such as 2, or "
                    f"{type(self).__name__} is not unbiased"
                )
            return
        if engine.samples_with_student:
            raise ConfigError(
                "loss.importance_ratio_cap corrects for a sampler that is another engine; here the trainer's own model "
                "samples: set it to null"
            )
        if engine.temperature != 1:
            raise ConfigError(
                f"loss.importance_ratio_cap needs rollout.temperature 1, not {engine.temperature}: samplers report "
                "log-probabilities at temperature 1"
            )

    def weights(self, log_p_T1: Tensor, tokens: ResponseTokens, metrics: Metrics) -> Tensor:
        """w of each token, [T, 1]."""
        gap_T1 = log_p_T1 - tokens.sampler_logprobs_T.unsqueeze(-1).to(log_p_T1)
        if self.student_temperature == 1:  # samplers report log-probabilities at temperature 1
            metrics.add_each("token/logprob_gap", gap_T1.abs())
        if self.importance_ratio_cap is None:
            return torch.ones_like(log_p_T1)
        weight_T1 = gap_T1.exp().clamp_(max=self.importance_ratio_cap)
        metrics.add_each("token/importance_ratio", weight_T1)
        return weight_T1


@dataclass(kw_only=True, eq=False)
class SampledReverseKL(ScoreFunctionLoss):
    """The score-function estimate of ∇KL(p‖q) from the sampled token y (Eq. 3).

    loss = −w · r · log p(y) with the reward r = log q(y) − log p(y). See `ScoreFunctionLoss` for w.

    Attributes:
        reward_clip: limits r to ±reward_clip, which adds a bias; None does not clip.
        reward_max: limits r from above alone: tokens that the teacher finds much more likely than the student does not
            pull harder than that. A bias too; None does not.
    """

    reward_clip: float | None = None
    reward_max: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reward_clip", "reward_max"):
            if (value := getattr(self, name)) is not None:
                check_positive(f"loss.{name}", value)

    def objective(self, chunk: Comparison, metrics: Metrics) -> tuple[Tensor, Tensor]:
        """As in `DenseTokenLoss`."""
        token_T1 = chunk.tokens.tokens_T.unsqueeze(-1)
        log_p_T1, log_ratio_T1 = chunk.log_p_TV.gather(1, token_T1), chunk.log_ratio_TV.gather(1, token_T1)
        reward_T1 = -log_ratio_T1
        if self.reward_clip is not None:
            reward_T1.clamp_(-self.reward_clip, self.reward_clip)
        if self.reward_max is not None:
            reward_T1.clamp_(max=self.reward_max)
        weight_T1 = self.weights(log_p_T1, chunk.tokens, metrics)
        baseline_T, p_TV = self.baseline(chunk, metrics)
        advantage_T1 = weight_T1 * (reward_T1 + baseline_T.unsqueeze(-1))
        return score_gradient(p_TV, log_p_T1, token_T1, advantage_T1)

    def baseline(self, chunk: Comparison, metrics: Metrics) -> tuple[Tensor, Tensor]:
        """The baseline that is added to the reward, [T], and p, [T, V], which overwrites log p."""
        kl_T, p_TV = exact_kl(chunk, metrics)
        return torch.zeros_like(kl_T), p_TV


def exact_kl(chunk: Comparison, metrics: Metrics) -> tuple[Tensor, Tensor]:
    """KL(p‖q) at each token, also added to `metrics`, and p, which overwrites log p."""
    p_TV = chunk.log_p_TV.exp_()
    kl_T = row_dot(p_TV, chunk.log_ratio_TV)
    metrics.add_each("token/kl", kl_T)
    return kl_T, p_TV


def score_gradient(p_TV: Tensor, log_p_TK: Tensor, ids_TK: Tensor, advantage_TK: Tensor) -> tuple[Tensor, Tensor]:
    """−Σ_k A_tk · log p(ids_tk) with A held constant, and its gradient (Σ_k A_tk) · p − A, which overwrites p."""
    loss_T = -(advantage_TK * log_p_TK).sum(-1)
    gradient_TV = p_TV.mul_(advantage_TK.sum(-1, keepdim=True))
    return loss_T, gradient_TV.scatter_add_(1, ids_TK, -advantage_TK)
