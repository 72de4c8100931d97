"""Parts of a composite that need no teacher: cross-entropy on reference answers, and a task's reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from oprd_tune.errors import ConfigError
from oprd_tune.grading.calls import find_grader
from oprd_tune.losses.reverse_kl import ScoreFunctionLoss, score_gradient
from oprd_tune.losses.token_loss import Comparison, DenseTokenLoss, Side, log_softmax_
from oprd_tune.metrics.step import Metrics
from oprd_tune.protocols import Grader
from oprd_tune.selection import ResponseTokens

_SMALLEST_SPREAD = 1e-4  # is added to the deviation of a group's rewards, as in GRPO


class ReferenceCrossEntropy(DenseTokenLoss):
    """−log p(y) of the tokens of reference answers, which `reference_share` puts in the place of samples.

    It anchors a composite to the data. Tokens that were sampled do not enter, neither into its sum nor into its N.
    """

    reads_references_alone, reads_teacher = True, False

    def chosen(self, tokens: ResponseTokens) -> Tensor | None:
        """As in `TokenLoss`: the tokens of given responses."""
        given_T = tokens.given_T
        return torch.zeros_like(tokens.tokens_T, dtype=torch.bool) if given_T is None else given_T

    def compared(self, student: Side, teacher: Side, tokens: ResponseTokens) -> Comparison:
        return _of_student(student, tokens)

    def objective(self, chunk: Comparison, metrics: Metrics) -> tuple[Tensor, Tensor]:
        """As in `DenseTokenLoss`. The gradient is p, less 1 at the token."""
        token_T1 = chunk.tokens.tokens_T.unsqueeze(-1)
        loss_T = -chunk.log_p_TV.gather(1, token_T1).squeeze(-1)
        metrics.add_each("token/reference_nll", loss_T)
        return loss_T, chunk.log_p_TV.exp_().scatter_add_(1, token_T1, -torch.ones_like(loss_T).unsqueeze(-1))


@dataclass(kw_only=True, eq=False)
class TaskReward(ScoreFunctionLoss):
    """loss = −w · A · log p(y) with the advantage A of the response that the token y belongs to (GRPO, one update).

    A = (r − mean) / (deviation + 1e-4) over the samples of one prompt, where the reward r of a response is the grader's
    verdict, 1 or 0. So a group whose members are all right, or all wrong, teaches nothing. Reference answers do not
    enter.

    Attributes:
        grader: a function (response, answer) → bool, or its dotted path.
        normalise: whether to divide by the deviation. Without it, questions weigh by how undecided they are (Dr. GRPO,
            Liu et al. 2025).
    """

    grader: Grader | str
    normalise: bool = True
    reads_teacher: ClassVar[bool] = False
    grade: Grader = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grade = find_grader("loss.grader", self.grader)

    def advantages(self, reward_B: Tensor, group_B: Tensor) -> Tensor:
        """A of each response, [B], from rewards and the number of each response's prompt."""
        advantage_B = torch.zeros_like(reward_B)
        for group in group_B.unique():
            own_B = group_B == group
            reward_N = reward_B[own_B]
            spread = reward_N.std() + _SMALLEST_SPREAD if self.normalise and len(reward_N) > 1 else 1.0
            advantage_B[own_B] = (reward_N - reward_N.mean()) / spread
        return advantage_B

    def compared(self, student: Side, teacher: Side, tokens: ResponseTokens) -> Comparison:
        return _of_student(student, tokens)

    def objective(self, chunk: Comparison, metrics: Metrics) -> tuple[Tensor, Tensor]:
        """As in `DenseTokenLoss`."""
        if chunk.tokens.advantage_T is None:
            raise ConfigError("TaskReward needs graded responses; opd_topk_distributed grades them")
        token_T1 = chunk.tokens.tokens_T.unsqueeze(-1)
        log_p_T1 = chunk.log_p_TV.gather(1, token_T1)
        weight_T1 = self.weights(log_p_T1, chunk.tokens, metrics)
        advantage_T1 = weight_T1 * chunk.tokens.advantage_T.unsqueeze(-1).to(log_p_T1)
        return score_gradient(chunk.log_p_TV.exp_(), log_p_T1, token_T1, advantage_T1)


def _of_student(student: Side, tokens: ResponseTokens) -> Comparison:
    """A chunk without the teacher's head, which does not run."""
    log_p_TV = log_softmax_(student.logits())
    return Comparison(log_p_TV, log_p_TV[:, :0], tokens)
