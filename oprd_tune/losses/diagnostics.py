"""Diagnostics on a few tokens: how the student differs from the teacher, and how noisy the sampled objectives are.

They use both full next-token distributions, so expectations over the next token are exact sums over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oprd_tune.losses.token_loss import log_softmax_, row_dot
from oprd_tune.metrics.step import Metrics
from oprd_tune.modeling.heads import Heads, head_logits
from oprd_tune.selection import ResponseTokens
from oprd_tune.types import Rollout

DIFFERENCES = "diagnostics/tokens"
_TOKENS_AT_ONCE = 16
_SHOWN, _CANDIDATES, _CONTEXT = 8, 3, 48  # tokens that are kept of a microbatch, candidates of each, tokens before it


@dataclass(frozen=True)
class TokenDifference:
    """A place in a response where student and teacher differ.

    Attributes:
        kl: KL(p‖q) of the student's p to the teacher's q, in nats.
        before: the tokens that both have read last.
        token: the token that was sampled there.
        student, teacher: the most probable next tokens of each, with their probabilities.
    """

    kl: float
    before: list[int]
    token: int
    student: list[tuple[int, float]]
    teacher: list[tuple[int, float]]


class Probe:
    """Runs `diagnose` on `count` evenly spaced response tokens. Call it with the student's final state.

    `teacher_TC` is the teacher's final state at `tokens.index_T`, which are response tokens of `rollout`. `metrics` is
    empty before the call. Afterwards it also notes where the models differ most, as `diagnostics/tokens`.
    """

    def __init__(
        self,
        heads: Heads,
        teacher_TC: Tensor,
        tokens: ResponseTokens,
        rollout: Rollout,
        *,
        count: int,
        k: int,
    ) -> None:
        chosen = evenly_spaced(len(tokens), count, tokens.index_T.device)
        self._heads, self._k, self._rollout = heads, k, rollout
        self._teacher_TC, self._index_T = teacher_TC[chosen], tokens.index_T[chosen]
        self.metrics = Metrics()

    def __call__(self, state_BSD: Tensor) -> None:
        student_TD = state_BSD.detach().flatten(0, 1)[self._index_T]
        self.metrics, kl_T = diagnose(student_TD, self._teacher_TC, self._heads, k=self._k)
        worst = kl_T.topk(min(_SHOWN, len(kl_T))).indices
        for difference in self._differences(student_TD[worst], self._teacher_TC[worst], kl_T[worst], worst):
            self.metrics.note(DIFFERENCES, difference)

    @torch.no_grad()
    def _differences(
        self, student_TD: Tensor, teacher_TC: Tensor, kl_T: Tensor, place_T: Tensor
    ) -> list[TokenDifference]:
        heads = ((student_TD, self._heads.student_VD), (teacher_TC, self._heads.teacher_VC))
        tops = [head_logits(state, weight).softmax(-1).topk(_CANDIDATES) for state, weight in heads]
        candidates = [
            [
                list(zip(ids, values, strict=True))
                for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
            for top in tops
        ]
        tokens_BS, index_T = self._rollout.tokens_BS, self._rollout.in_grid(self._index_T[place_T])
        found = []
        for n, (index, kl) in enumerate(zip(index_T.tolist(), kl_T.tolist(), strict=True)):
            row, column = divmod(index, tokens_BS.shape[1])
            read = tokens_BS[row, max(0, column + 1 - _CONTEXT) : column + 2].tolist()
            found.append(TokenDifference(kl, read[:-1], read[-1], candidates[0][n], candidates[1][n]))
        return found


def evenly_spaced(count: int, wanted: int, device: torch.device) -> Tensor:
    """Indices of `wanted` of `count` tokens, or of all tokens if there are fewer."""
    wanted = min(count, wanted)
    return torch.arange(wanted, device=device) * count // max(1, wanted)


@torch.no_grad()
def diagnose(student_TD: Tensor, teacher_TC: Tensor, heads: Heads, *, k: int) -> tuple[Metrics, Tensor]:
    """The metrics `diagnostics/…` of both distributions at the given final states, and each token's KL(p‖q), [T].

    At temperature 1, in nats. The metrics are sums over tokens.

    P(𝒮) and Q(𝒮) are the masses that student and teacher put on the student's `k` most probable tokens. The overlap is
    the share of those tokens that are also among the teacher's `k` most probable.
    """
    metrics, kls = Metrics(), [student_TD.new_zeros(0, dtype=torch.float32)]
    for student, teacher in zip(student_TD.split(_TOKENS_AT_ONCE), teacher_TC.split(_TOKENS_AT_ONCE), strict=True):
        log_p_TV = log_softmax_(head_logits(student, heads.student_VD))
        log_q_TV = log_softmax_(head_logits(teacher, heads.teacher_VC))
        _supports(metrics, log_p_TV, log_q_TV, min(k, heads.vocabulary))
        p_TV = log_p_TV.exp()
        entropy_p_T, entropy_q_T = -row_dot(p_TV, log_p_TV), -row_dot(log_q_TV.exp(), log_q_TV)
        metrics.add_each("diagnostics/student_entropy", entropy_p_T)
        metrics.add_each("diagnostics/teacher_entropy", entropy_q_T)
        metrics.add_each("diagnostics/entropy_gap", entropy_q_T - entropy_p_T)
        kls.append(_gradients(metrics, p_TV, log_p_TV.sub_(log_q_TV)))
    return metrics, torch.cat(kls)


def _supports(metrics: Metrics, log_p_TV: Tensor, log_q_TV: Tensor, k: int) -> None:
    top_p_TK, student_ids_TK = log_p_TV.topk(k, dim=-1)
    teacher_ids_TK = log_q_TV.topk(k, dim=-1).indices
    shared_TK = (student_ids_TK.unsqueeze(2) == teacher_ids_TK.unsqueeze(1)).any(2)
    metrics.add_each("diagnostics/student_mass", top_p_TK.exp().sum(-1))
    metrics.add_each("diagnostics/teacher_mass", log_q_TV.gather(1, student_ids_TK).exp().sum(-1))
    metrics.add_each("diagnostics/top_k_overlap", shared_TK.double().mean(-1))


def _gradients(metrics: Metrics, p_TV: Tensor, log_ratio_TV: Tensor) -> Tensor:
    """KL(p‖q), [T]. Adds its gradient's square, and the variance of two estimates of that gradient.

    An estimate is −A(y)·∇log p(y), with respect to the logits; its mean and variance are over y ~ p.
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
    return kl_T
