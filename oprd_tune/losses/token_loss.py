"""What the losses on next-token distributions share: arguments, the stream of one microbatch, and the dense pass.

Throughout, p is the student and q the teacher. KLs are reverse, KL(p‖q), in nats. A position is a response token given
its prefix. As is usual, gradients leave out the score term of the whole trajectory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from oprd_tune.config.checks import check_positive, check_whole
from oprd_tune.losses.head_pass import DenseHeadGradient, HeadSum, head_sum
from oprd_tune.losses.streaming import check_one_a_token
from oprd_tune.metrics.step import Metrics
from oprd_tune.modeling.heads import Heads, add_product, gathered_logits, head_logits, wide
from oprd_tune.protocols import RolloutEngine
from oprd_tune.selection import ResponseTokens
from oprd_tune.torchtune_compat import compile_backend

_MOST_AT_ONCE = 4096


@dataclass(frozen=True)
class Side:
    """Final states and LM head of one model. Its logits are divided by `temperature` and are at least fp32."""

    state_TD: Tensor
    weight_VD: Tensor
    temperature: float

    def logits(self) -> Tensor:
        """Logits of the whole vocabulary, [T, V]."""
        return divided_(head_logits(self.state_TD, self.weight_VD), self.temperature)

    def logits_on(self, ids_TK: Tensor) -> Tensor:
        """Logits of K tokens at each position, [T, K]; the other tokens' logits are not computed."""
        return divided_(gathered_logits(self.state_TD, self.weight_VD, ids_TK), self.temperature)


@dataclass(kw_only=True, eq=False)
class TokenLoss:
    """Base of the losses that compare next-token distributions.

    Attributes:
        student_temperature: divides the student's logits; the loss is not rescaled.
        teacher_temperature: divides the teacher's logits; the loss is not rescaled.
        chunk_tokens: how many tokens have logits at the same time. Each takes 4·V bytes, once or twice. This limits
            memory and never changes the loss. None takes `usual_chunk`, and more where a device has room, see `fit`.
        at_once: the number that is used.
        sampler_top_k: how many of the sampler's most probable tokens the loss needs with the rollout.
        needs_samples: whether the loss needs what the sampler says of each token, which given responses have not. It
            then leaves those out.
        reads_references_alone: whether the loss leaves out what was sampled.
        reads_teacher: whether the loss compares the student with the teacher.

    Raises:
        ConfigError: for a temperature that is not positive, or an empty chunk.
    """

    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    chunk_tokens: int | None = None
    at_once: int = field(default=0, init=False)
    sampler_top_k: int = field(default=0, init=False)
    needs_samples: bool = field(default=False, init=False)
    reads_references_alone: ClassVar[bool] = False
    reads_teacher: ClassVar[bool] = True
    usual_chunk: ClassVar[int] = 512

    def __post_init__(self) -> None:
        check_positive("loss.student_temperature", self.student_temperature)
        check_positive("loss.teacher_temperature", self.teacher_temperature)
        if self.chunk_tokens is not None:
            check_whole("loss.chunk_tokens", self.chunk_tokens)
        self.at_once = self.chunk_tokens or self.usual_chunk

    def check(self, vocabulary: int, engine: RolloutEngine) -> None:
        """Raise ConfigError if the loss cannot use this engine, or these heads, which share `vocabulary` tokens."""

    def working_bytes(self, vocabulary: int, width: int) -> int:
        """Upper bound, in bytes, on the memory for chunks of logits. `width` is the student's."""
        return 3 * self.at_once * vocabulary * 4

    def waiting_bytes(self, vocabulary: int, width: int) -> int:
        """Bytes of the head's gradient that wait for the backward pass."""
        return 0

    def fit(self, room: int, vocabulary: int, width: int) -> None:
        """Take larger chunks if none were asked for: as many tokens as `room` bytes hold, up to `_MOST_AT_ONCE`.

        Each chunk reads and writes the head's whole gradient, so larger ones cost less time.
        """
        while self.chunk_tokens is None and self.at_once < _MOST_AT_ONCE:
            self.at_once *= 2
            if self.working_bytes(vocabulary, width) > room:
                self.at_once //= 2
                return

    def compile(self) -> None:
        """Fuse what a chunk of logits goes through, if the loss can."""

    def evaluate(
        self, student_TD: Tensor, teacher_TC: Tensor, heads: Heads, tokens: ResponseTokens, metrics: Metrics
    ) -> HeadSum:
        """The sum over tokens, each times its `tokens.weight_T`, with its unscaled gradients.

        Adds what it measures to `metrics`.
        """
        raise NotImplementedError

    def chosen(self, tokens: ResponseTokens) -> Tensor | None:
        """Which of the tokens the loss reads, as a mask [T]; None for all of them."""
        return ~tokens.given_T if self.needs_samples and tokens.given_T is not None else None

    def count(self, tokens: ResponseTokens) -> int:
        """N of the loss on these tokens."""
        chosen_T = self.chosen(tokens)
        return (tokens if chosen_T is None else tokens.only(chosen_T)).count

    def sides(self, student_TD: Tensor, teacher_TC: Tensor, heads: Heads) -> tuple[Side, Side]:
        """Student and teacher at a chunk of positions."""
        student = Side(student_TD, heads.student_VD, self.student_temperature)
        return student, Side(teacher_TC, heads.teacher_VC, self.teacher_temperature)

    def stream(self, heads: Heads, teacher_TC: Tensor, tokens: ResponseTokens) -> TokenStream:
        """Start one microbatch. `teacher_TC` is the teacher's final state at `tokens.index_T`."""
        if (chosen_T := self.chosen(tokens)) is not None:
            index = chosen_T.nonzero().squeeze(1)  # of a GPU, the host waits for it, once
            tokens, teacher_TC = tokens.only(index), teacher_TC[index]
        return TokenStream(self, heads, teacher_TC, tokens)


class TokenStream:
    """One microbatch of a token loss. Call it with the last layer's state.

    Then `total` is the sum over tokens, a scalar with a graph, and `metrics` is complete.
    """

    def __init__(self, loss: TokenLoss, heads: Heads, teacher_TC: Tensor, tokens: ResponseTokens) -> None:
        self._loss, self._heads, self._teacher_TC, self._tokens = loss, heads, teacher_TC, tokens
        self.layers = (heads.student.layer,)
        self.total: Tensor | None = None
        self.metrics = Metrics()

    def __call__(self, layer: int, state_BSD: Tensor) -> Tensor:
        def evaluate(student_TD: Tensor) -> HeadSum:
            return self._loss.evaluate(student_TD, self._teacher_TC, self._heads, self._tokens, self.metrics)

        self.total = head_sum(state_BSD, self._tokens.index_T, self._heads.student.weight_VD, evaluate)
        return self.total


@dataclass
class Comparison:
    """The student's log p and the ratio log p − log q on a chunk of tokens. Objectives may overwrite the tensors."""

    log_p_TV: Tensor
    log_ratio_TV: Tensor
    tokens: ResponseTokens


def compare(student: Side, teacher: Side, tokens: ResponseTokens) -> Comparison:
    """Run both heads on a chunk. The result holds two [T, V] tensors."""
    log_p_TV, log_q_TV = log_softmax_(student.logits()), log_softmax_(teacher.logits())
    return Comparison(log_p_TV, torch.sub(log_p_TV, log_q_TV, out=log_q_TV), tokens)


class DenseTokenLoss(TokenLoss):
    """Base of the losses whose gradient reaches every logit. Each head runs forward once per chunk of tokens."""

    def compared(self, student: Side, teacher: Side, tokens: ResponseTokens) -> Comparison:
        """What `objective` gets: both models' distributions at a chunk of tokens."""
        return compare(student, teacher, tokens)

    def objective(self, chunk: Comparison, metrics: Metrics) -> tuple[Tensor, Tensor]:
        """The chunk's losses [T], and their gradient [T, V] with respect to the student's temperature-scaled logits."""
        raise NotImplementedError

    def scored(self, student: Side, teacher: Side, tokens: ResponseTokens) -> tuple[Tensor, Tensor, Metrics]:
        """A chunk's sum, its gradient with respect to the student's logits, [T, V], and what was measured.

        A function of tensors alone, which `compile` turns into a few kernels.
        """
        metrics = Metrics()
        loss_T, logits_TV = self.objective(self.compared(student, teacher, tokens), metrics)
        check_one_a_token(f"{type(self).__name__}.objective", loss_T, student.state_TD)
        if tokens.weight_T is not None:
            loss_T, logits_TV = loss_T * tokens.weight_T, logits_TV.mul_(tokens.weight_T.unsqueeze(-1))
        logits_TV = divided_(logits_TV, self.student_temperature).to(student.weight_VD.dtype)
        return loss_T.sum(), logits_TV, metrics

    def compile(self) -> None:
        """As in `TokenLoss`."""
        self.scored = torch.compile(self.scored, dynamic=True, backend=compile_backend())  # type: ignore[method-assign]

    def waiting_bytes(self, vocabulary: int, width: int) -> int:
        """As in `TokenLoss`: it is collected in fp32."""
        return vocabulary * width * 4

    def evaluate(
        self, student_TD: Tensor, teacher_TC: Tensor, heads: Heads, tokens: ResponseTokens, metrics: Metrics
    ) -> HeadSum:
        """As in `TokenLoss`, chunk by chunk."""
        weight_VD = heads.student_VD
        student_TD, dtype = student_TD.to(weight_VD.dtype), wide(weight_VD.dtype)
        gradient_TD = torch.empty_like(student_TD)
        gradient_VD = torch.zeros_like(weight_VD, dtype=dtype) if heads.student.weight_VD.requires_grad else None
        total = torch.zeros((), dtype=dtype, device=weight_VD.device)
        for start in range(0, len(student_TD), self.at_once):
            rows = slice(start, start + self.at_once)
            sides = self.sides(student_TD[rows], teacher_TC[rows], heads)
            chunk_sum, logits_TV, measured = self.scored(*sides, tokens.chunk(start, self.at_once))
            metrics.merge(measured)
            total += chunk_sum
            gradient_TD[rows] = logits_TV @ weight_VD
            if gradient_VD is not None:
                add_product(gradient_VD, logits_TV, student_TD[rows])
            del logits_TV  # free them before those of the next chunk are formed
        return HeadSum(total, gradient_TD, None if gradient_VD is None else DenseHeadGradient(gradient_VD))


def log_softmax_(logits_TV: Tensor) -> Tensor:
    """Log-probabilities, which overwrite the logits, in one kernel.

    It subtracts each row's maximum before it sums, so a large offset that all logits share costs no precision. Each
    value is read a last time by the thread that writes it, so the kernel may work in place.
    """
    return torch.log_softmax(logits_TV, dim=-1, out=logits_TV)


def divided_(logits_TV: Tensor, temperature: float) -> Tensor:
    """Divide in place; a temperature of 1 costs no pass over the logits."""
    return logits_TV if temperature == 1 else logits_TV.div_(temperature)


def row_dot(a_TV: Tensor, b_TV: Tensor) -> Tensor:
    """Σ_v a·b, [T], formed without a third [T, V]."""
    return torch.bmm(a_TV.unsqueeze(1), b_TV.unsqueeze(2)).flatten()
