"""Diagnostics on a few tokens: how the student differs from the teacher, and how noisy the sampled objectives are.

They use both full next-token distributions, so expectations over the next token are exact sums over the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oprd_tune.losses.token_loss import log_softmax_, row_dot
from oprd_tune.metrics.step import Metrics
from oprd_tune.modeling.heads import Heads, head_logits
from oprd_tune.types import ResponseTokens

_TOKENS_AT_ONCE = 16


class Probe:
    """Runs `diagnose` on `count` evenly spaced response tokens. Call it with the student's final state.

    `teacher_TC` is the teacher's final state at `tokens.index_T`. `metrics` is empty before the call.
    """

    def __init__(self, heads: Heads, teacher_TC: Tensor, tokens: ResponseTokens, *, count: int, k: int) -> None:
        chosen = evenly_spaced(len(tokens), count, tokens.index_T.device)
        self._heads, self._k = heads, k
        self._teacher_TC, self._index_T = teacher_TC[chosen], tokens.index_T[chosen]
        self.metrics = Metrics()

    def __call__(self, state_BSD: Tensor) -> None:
        student_TD = state_BSD.detach().flatten(0, 1)[self._index_T]
        self.metrics = diagnose(student_TD, self._teacher_TC, self._heads, k=self._k)


def evenly_spaced(count: int, wanted: int, device: torch.device) -> Tensor:
    """Indices of `wanted` of `count` tokens, or of all tokens if there are fewer."""
    wanted = min(count, wanted)
    return torch.arange(wanted, device=device) * count // max(1, wanted)


@torch.no_grad()
def diagnose(student_TD: Tensor, teacher_TC: Tensor, heads: Heads, *, k: int) -> Metrics:
    """The metrics `diagnostics/…` of both distributions at the given final states, at temperature 1; sums over tokens.

    P(𝒮) and Q(𝒮) are the masses that student and teacher put on the student's `k` most probable tokens. The overlap is
    the share of those tokens that are also among the teacher's `k` most probable.
    """
    metrics = Metrics()
    for student, teacher in zip(student_TD.split(_TOKENS_AT_ONCE), teacher_TC.split(_TOKENS_AT_ONCE), strict=True):
        log_p_TV = log_softmax_(head_logits(student, heads.student_VD))
        log_q_TV = log_softmax_(head_logits(teacher, heads.teacher_VC))
        _supports(metrics, log_p_TV, log_q_TV, min(k, heads.vocabulary))
        p_TV = log_p_TV.exp()
        entropy_p_T, entropy_q_T = -row_dot(p_TV, log_p_TV), -row_dot(log_q_TV.exp(), log_q_TV)
        metrics.add_each("diagnostics/student_entropy", entropy_p_T)
        metrics.add_each("diagnostics/teacher_entropy", entropy_q_T)
        metrics.add_each("diagnostics/entropy_gap", entropy_q_T - entropy_p_T)
        _gradients(metrics, p_TV, log_p_TV.sub_(log_q_TV))
    return metrics


def _supports(metrics: Metrics, log_p_TV: Tensor, log_q_TV: Tensor, k: int) -> None:
    top_p_TK, student_ids_TK = log_p_TV.topk(k, dim=-1)
    teacher_ids_TK = log_q_TV.topk(k, dim=-1).indices
    shared_TK = (student_ids_TK.unsqueeze(2) == teacher_ids_TK.unsqueeze(1)).any(2)
    metrics.add_each("diagnostics/student_mass", top_p_TK.exp().sum(-1))
    metrics.add_each("diagnostics/teacher_mass", log_q_TV.gather(1, student_ids_TK).exp().sum(-1))
    metrics.add_each("diagnostics/top_k_overlap", shared_TK.double().mean(-1))


def _gradients(metrics: Metrics, p_TV: Tensor, log_ratio_TV: Tensor) -> None:
    """Squared mean and variance, over y ~ p, of the estimate −A(y)·∇log p(y) of ∇KL with respect to the logits.

    ‖∇log p(y)‖² = 1 − 2·p_y + ‖p‖². The mean is ∇KL, whatever constant A contains.
    """
    kl_T = row_dot(p_TV, log_ratio_TV)
    centred_TV = log_ratio_TV - kl_T.unsqueeze(-1)
    mean_square_T = (p_TV * centred_TV).square().sum(-1)
    score_square_TV = 1 - 2 * p_TV + p_TV.square().sum(-1, keepdim=True)
    metrics.add_each("diagnostics/kl", kl_T)
    metrics.add_each("diagnostics/gradient_square", mean_square_T)
    for name, advantage_TV in (("sampled", log_ratio_TV), ("vopd", centred_TV)):
        second_moment_T = (p_TV * advantage_TV.square() * score_square_TV).sum(-1)
        metrics.add_each(f"diagnostics/variance_{name}", second_moment_T - mean_square_T)
