"""KLs on a support of K tokens (Eq. 5 of arXiv 2606.06021), and the detached loss of the published baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from oprd_tune.config.checks import check_share, check_whole
from oprd_tune.errors import ConfigError
from oprd_tune.losses.head_pass import HeadSum, SparseHeadGradient
from oprd_tune.losses.reverse_kl import exact_kl, score_gradient
from oprd_tune.losses.token_loss import Comparison, DenseTokenLoss, Side, TokenLoss, divided_, log_softmax_
from oprd_tune.metrics.step import Metrics
from oprd_tune.modeling.heads import Heads, weighted_rows, wide
from oprd_tune.protocols import RolloutEngine
from oprd_tune.selection import ResponseTokens


@dataclass(frozen=True)
class Support:
    """The support 𝒮 at each token of a chunk, with what is known since it was chosen.

    Attributes:
        ids_TK: the tokens.
        repeated_TK: True where an id repeats the one before it in its row; None if ids cannot repeat.
        log_p_TK: the student's log-probabilities on the support; None if its head did not run.
        log_q_TK: the same of the teacher.
        student_mass_T: P(𝒮), if the sampler reported it.
    """

    ids_TK: Tensor
    repeated_TK: Tensor | None = None
    log_p_TK: Tensor | None = None
    log_q_TK: Tensor | None = None
    student_mass_T: Tensor | None = None


def student_support(student: Side, teacher: Side, tokens: ResponseTokens, k: int) -> Support:
    """The student's top-k. Only the student's head runs, without gradient."""
    top = _top(student, k)
    return Support(top.ids_TK, log_p_TK=top.log_p_TK)


def teacher_support(student: Side, teacher: Side, tokens: ResponseTokens, k: int) -> Support:
    """The teacher's top-k. Only the teacher's head runs, so P(𝒮) is not known."""
    top = _top(teacher, k)
    return Support(top.ids_TK, log_q_TK=top.log_p_TK)


def union_support(student: Side, teacher: Side, tokens: ResponseTokens, k: int) -> Support:
    """The union of both top-k, each token counted once. Both heads run once."""
    tops = _top(student, k), _top(teacher, k)
    ids_TK = torch.cat([top.ids_TK for top in tops], dim=1).sort(dim=1).values
    repeated_TK = torch.zeros_like(ids_TK, dtype=torch.bool)
    repeated_TK[:, 1:] = ids_TK[:, 1:] == ids_TK[:, :-1]
    return Support(ids_TK, repeated_TK, tops[0].log_p_on(student, ids_TK), tops[1].log_p_on(teacher, ids_TK))


def sampler_support(student: Side, teacher: Side, tokens: ResponseTokens, k: int) -> Support:
    """The top-k that the sampler returned with the rollout. Neither head runs, and P(𝒮) is the sampler's."""
    assert tokens.sampler_top_ids_TK is not None
    ids_TK, mass_T = tokens.sampler_top_ids_TK, tokens.sampler_top_mass_T
    return Support(ids_TK[:, :k], student_mass_T=mass_T if ids_TK.shape[1] == k else None)


SUPPORTS: dict[str, Callable[[Side, Side, ResponseTokens, int], Support]] = {
    "student": student_support,
    "teacher": teacher_support,
    "union": union_support,
    "sampler": sampler_support,
}


@dataclass(kw_only=True, eq=False)
class TopKReverseKL(TokenLoss):
    """KL(p̄‖q̄), both renormalised on a support 𝒮 of K tokens, with its exact gradient (Eq. 5).

    The loss does not constrain the mass on 𝒮, so watch P(𝒮) and Q(𝒮). P(𝒮) is measured if the student's head runs, Q(𝒮)
    if the teacher's does. Once 𝒮 is chosen, each model's logits cost K dot products per token, and the gradient reaches
    K rows of the head.

    Attributes:
        k: size of the support; at least 2, because a single token always has probability 1 after renormalisation.
        support: `student` (its top-k), `teacher`, `union`, or `sampler` (the top-k that the rollout engine returns).
            With `sampler`, no head runs on the vocabulary, and another engine's top-k may differ from the student's.

    Raises:
        ConfigError: for a k below 2 or an unknown support.
    """

    k: int = 16
    support: str = "student"
    usual_chunk: ClassVar[int] = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("loss.k", self.k, at_least=2)
        if self.support not in SUPPORTS:
            raise ConfigError(f"loss.support is {self.support!r}; allowed are {', '.join(SUPPORTS)}")
        self._choose = SUPPORTS[self.support]
        self.needs_samples = self.support == "sampler"
        self.sampler_top_k = self.k if self.needs_samples else 0

    def check(self, vocabulary: int, engine: RolloutEngine) -> None:
        check_k("k", self.k, vocabulary)

    def evaluate(
        self, student_TD: Tensor, teacher_TC: Tensor, heads: Heads, tokens: ResponseTokens, metrics: Metrics
    ) -> HeadSum:
        """As in `TokenLoss`, chunk by chunk."""
        weight_VD = heads.student_VD
        gradient_TD = torch.empty_like(student_TD)
        total = torch.zeros((), dtype=wide(weight_VD.dtype), device=weight_VD.device)
        all_ids, all_factors = [], []
        for start in range(0, max(1, len(student_TD)), self.at_once):
            rows = slice(start, start + self.at_once)
            part = tokens.chunk(start, self.at_once)
            student, teacher = self.sides(student_TD[rows], teacher_TC[rows], heads)
            support = self._choose(student, teacher, part, self.k)
            student_TK = _logits_on(support, student, support.log_p_TK)
            teacher_TK = _logits_on(support, teacher, support.log_q_TK)
            loss_T, factor_TK = self.objective(student_TK, teacher_TK, support.repeated_TK, metrics)
            factor_TK = divided_(factor_TK, self.student_temperature)
            if part.weight_T is not None:
                factor_TK *= part.weight_T.unsqueeze(-1)
            total += (loss_T if part.weight_T is None else loss_T * part.weight_T).sum()
            gradient_TD[rows] = weighted_rows(weight_VD, support.ids_TK, factor_TK)
            all_ids.append(support.ids_TK)
            all_factors.append(factor_TK)
            if support.log_p_TK is not None:
                metrics.add_each("token/student_mass", student_TK.exp().sum(-1))
            if support.log_q_TK is not None:
                metrics.add_each("token/teacher_mass", teacher_TK.exp().sum(-1))
            if support.student_mass_T is not None:
                metrics.add_each("token/student_mass", support.student_mass_T)
        return HeadSum(total, gradient_TD, SparseHeadGradient(torch.cat(all_ids), torch.cat(all_factors), student_TD))

    def objective(
        self, log_p_TK: Tensor, log_q_TK: Tensor, skipped_TK: Tensor | None, metrics: Metrics
    ) -> tuple[Tensor, Tensor]:
        """The loss of each token, [T], and its gradient with respect to the student's logits on 𝒮, [T, K].

        Args:
            log_p_TK: the student's logits or log-probabilities on 𝒮.
            log_q_TK: the same of the teacher.
            skipped_TK: True where an id repeats, and both are −∞; None if ids cannot repeat.
        """
        kl_T, gradient_TK = renormalised_kl(log_p_TK, log_q_TK, skipped_TK)
        metrics.add_each("token/support_kl", kl_T)
        return kl_T, gradient_TK


@dataclass(kw_only=True, eq=False)
class TopKMixedKL(TopKReverseKL):
    """w · KL(q̄‖p̄) + (1 − w) · KL(p̄‖q̄), both renormalised on a support 𝒮 as in `TopKReverseKL`.

    With `support="teacher"` it is the loss of NeMo-RL's `kl_type: mixed`, and of its `forward` at w = 1.

    Attributes:
        forward_weight: w, between 0 and 1.
    """

    forward_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("loss.forward_weight", self.forward_weight)

    def objective(
        self, log_p_TK: Tensor, log_q_TK: Tensor, skipped_TK: Tensor | None, metrics: Metrics
    ) -> tuple[Tensor, Tensor]:
        """As in `TopKReverseKL`. The gradient of KL(q̄‖p̄) is p̄ − q̄."""
        reverse_T, gradient_TK = super().objective(log_p_TK, log_q_TK, skipped_TK, metrics)
        log_p_TK, log_ratio_TK = _renormalised(log_p_TK, log_q_TK, skipped_TK)
        q_TK = log_q_TK.softmax(-1)
        forward_T = -(q_TK * log_ratio_TK).sum(-1)
        weight = self.forward_weight
        return reverse_T.lerp(forward_T, weight), gradient_TK.lerp(log_p_TK.exp() - q_TK, weight)


@dataclass(kw_only=True, eq=False)
class DetachedTopKReverseKL(DenseTokenLoss):
    """The top-k loss of the OPRD authors' published baseline: detached weights, full-vocabulary log-probabilities.

    loss = −Σ_{v ∈ 𝒮} sg[p̄_v · (log q_v − log p_v)] · log p_v, where 𝒮 is the student's top-k. Its gradient is that of
    `TopKReverseKL` plus D̄ · ∇log P(𝒮), D̄ = KL(p̄‖q̄) + log(P(𝒮)/Q(𝒮)), so mass leaks out of 𝒮 wherever D̄ > 0. It is
    offered for fair comparisons with published numbers. `k` must be at least 2.
    """

    k: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("loss.k", self.k, at_least=2)

    def check(self, vocabulary: int, engine: RolloutEngine) -> None:
        check_k("k", self.k, vocabulary)

    def objective(self, chunk: Comparison, metrics: Metrics) -> tuple[Tensor, Tensor]:
        log_p_TK, ids_TK = chunk.log_p_TV.topk(self.k, dim=-1)
        log_ratio_TK = chunk.log_ratio_TV.gather(1, ids_TK)
        metrics.add_each("token/student_mass", log_p_TK.exp().sum(-1))
        metrics.add_each("token/teacher_mass", (log_p_TK - log_ratio_TK).exp().sum(-1))
        _, p_TV = exact_kl(chunk, metrics)
        return score_gradient(p_TV, log_p_TK, ids_TK, -log_p_TK.softmax(-1) * log_ratio_TK)


def renormalised_kl(log_p_TK: Tensor, log_q_TK: Tensor, skipped_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """KL(p̄‖q̄), [T], and its gradient with respect to the student's logits, [T, K].

    Both inputs are logits or log-probabilities on the support. Where `skipped_TK` is True, they must be −∞.
    """
    log_p_TK, log_ratio_TK = _renormalised(log_p_TK, log_q_TK, skipped_TK)
    p_TK = log_p_TK.exp()
    kl_T1 = (p_TK * log_ratio_TK).sum(-1, keepdim=True)
    return kl_T1.squeeze(-1), p_TK * (log_ratio_TK - kl_T1)


def _renormalised(log_p_TK: Tensor, log_q_TK: Tensor, skipped_TK: Tensor | None) -> tuple[Tensor, Tensor]:
    """log p̄ and log p̄ − log q̄, which is 0 where ids are skipped."""
    log_p_TK = log_p_TK.log_softmax(-1)
    log_ratio_TK = log_p_TK - log_q_TK.log_softmax(-1)
    return log_p_TK, log_ratio_TK if skipped_TK is None else log_ratio_TK.masked_fill(skipped_TK, 0)


def check_k(name: str, k: int, vocabulary: int) -> None:
    """Raise ConfigError for a support that is larger than the vocabulary."""
    if k > vocabulary:
        raise ConfigError(f"loss.{name} is {k}, but student and teacher share {vocabulary} tokens; lower it")


@dataclass(frozen=True)
class _Top:
    """A model's most probable tokens, with their logits and their log-probabilities over the whole vocabulary."""

    ids_TK: Tensor
    logits_TK: Tensor
    log_p_TK: Tensor

    def log_p_on(self, side: Side, ids_TK: Tensor) -> Tensor:
        """The same model's log-probabilities of other tokens, from their distance to the largest logit."""
        return side.logits_on(ids_TK).sub_(self.logits_TK[:, :1]).add_(self.log_p_TK[:, :1])


def _top(side: Side, k: int) -> _Top:
    logits_TV = side.logits()
    logits_TK, ids_TK = logits_TV.topk(k, dim=-1)
    return _Top(ids_TK, logits_TK, log_softmax_(logits_TV).gather(1, ids_TK))


def _logits_on(support: Support, side: Side, known_TK: Tensor | None) -> Tensor:
    """A model's log-probabilities on the support, or its logits if it has none; −∞ on repeated tokens."""
    logits_TK = side.logits_on(support.ids_TK) if known_TK is None else known_TK
    return logits_TK if support.repeated_TK is None else logits_TK.masked_fill(support.repeated_TK, -torch.inf)
