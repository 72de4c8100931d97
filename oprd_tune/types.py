"""What flows through a training step, as frozen dataclasses, and the letters that name tensor dimensions.

Dimension letters, used as suffixes of tensor names everywhere in this package:

    B  sequences           T  selected response tokens, packed over the batch    V  vocabulary
    P  prompt tokens       L  tapped layer pairs                                 H  attention heads
    S  tokens of a row     D  student width        C  teacher width              K  top-k
    U  tokens of a row as a teacher with another tokenizer reads it              R  rank of a bridge
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """Tokenized prompts of one step.

    Attributes:
        tokens: token ids of each prompt; none is empty.
        positions: each prompt's place in the run's endless stream of prompts. The same on any number of ranks, so
            sampling noise that depends on it is too.
        answers: reference answers, or None where the data has none.
        teacher_tokens: the same prompts as a teacher with another tokenizer reads them; None where it has the same.
    """

    tokens: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    answers: tuple[str | None, ...]
    teacher_tokens: tuple[tuple[int, ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def as_teacher_reads(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of each prompt as the teacher reads them."""
        return self.tokens if self.teacher_tokens is None else self.teacher_tokens


@dataclass(frozen=True)
class SamplingRequest:
    """What a run asks of the engine that samples its responses.

    Attributes:
        stop_tokens: ids that end a response; the one sampled belongs to it.
        pad_id: fills rows up to the longest.
        max_prompt_tokens: the longest prompt.
        max_new_tokens: a response that reaches it is cut and marked `truncated`.
        samples_per_prompt: responses to each prompt.
        seed: with the step and the sample's place in the run, determines the noise.
        vocabulary: sample from the first so many tokens only: those that the teacher has too. None takes all.
        top_k_ids: return that many of the most probable tokens with each sampled one; 0 returns none.
    """

    stop_tokens: Collection[int]
    pad_id: int
    max_prompt_tokens: int
    max_new_tokens: int
    samples_per_prompt: int = 1
    seed: int = 0
    vocabulary: int | None = None
    top_k_ids: int = 0


@dataclass(frozen=True)
class LogprobGap:
    """How far a sampler's log-probabilities of some of its tokens are from the trainer's, |Δ| in nats, over all ranks.

    Attributes:
        mean: over the tokens.
        largest: among them.
        tokens: how many were compared.
        seconds: that the comparison took.
    """

    mean: float
    largest: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Reading:
    """How a teacher with another tokenizer reads a rollout's rows: the same text in tokens of its own.

    Attributes:
        tokens_BU: the teacher's ids, prompt then response then right padding.
        lengths_B: its prompt and response tokens of each row.
        column_BS: for each column of the rollout, the teacher's column whose state has read exactly as much of the
            response; -1 where there is none, so in padding and in the prompt, except for the prompt's last column.
    """

    tokens_BU: Tensor
    lengths_B: Tensor
    column_BS: Tensor

    def rows(self, index_B: Tensor, width: int) -> Reading:
        """The given rows: the teacher's tokens trimmed to the longest of them, its columns to the student's `width`."""
        lengths_B = self.lengths_B[index_B]
        tokens_BU = self.tokens_BU[index_B, : int(lengths_B.max())]
        return Reading(tokens_BU=tokens_BU, lengths_B=lengths_B, column_BS=self.column_BS[index_B, :width])

    def within(self, context: int) -> Reading:
        """Without the tokens that are beyond a context; what meets there is not met."""
        column_BS = self.column_BS.where(self.column_BS < context, -1)
        return Reading(self.tokens_BU[:, :context], self.lengths_B.clamp(max=context), column_BS)

    def idle(self) -> Reading:
        """One token of one row, met by nothing."""
        one_B = torch.ones_like(self.lengths_B[:1])
        return Reading(self.tokens_BU[:1, :1], one_B, torch.full_like(self.column_BS[:1, :1], -1))


@dataclass(frozen=True)
class Rollout:
    """Prompts with sampled responses. Rows are right-padded: a token's column is its rotary position.

    Attributes:
        tokens_BS: token ids, prompt then response then padding.
        response_mask_BS: True on response tokens. A sampled EOS is one; padding never is.
        sampler_logprobs_BS: fp32 log-probabilities in nats that the sampler gave its tokens; 0 elsewhere.
        lengths_B: prompt and response tokens of each row.
        truncated_B: True where the response hit the token limit instead of a stop token.
        prompt_positions_B: `Prompts.positions` of each row's prompt.
        policy_version: optimizer steps that the sampling weights had seen.
        sampler_top_ids_BSK: the sampler's K most probable tokens at each response token, if it was asked for them.
        sampler_top_mass_BS: their probability together.
        logprob_gap: what was found when an engine with weights of its own was compared with the trainer.
        reading: the rows as a teacher with another tokenizer reads them; None where it reads the same tokens.
    """

    tokens_BS: Tensor
    response_mask_BS: Tensor
    sampler_logprobs_BS: Tensor
    lengths_B: Tensor
    truncated_B: Tensor
    prompt_positions_B: Tensor
    policy_version: int
    sampler_top_ids_BSK: Tensor | None = None
    sampler_top_mass_BS: Tensor | None = None
    logprob_gap: LogprobGap | None = None
    reading: Reading | None = None

    def __len__(self) -> int:
        return self.tokens_BS.shape[0]

    @property
    def teacher_tokens(self) -> Tensor:
        """Right-padded token ids as the teacher reads them."""
        return self.tokens_BS if self.reading is None else self.reading.tokens_BU

    @property
    def response_tokens(self) -> int:
        """Number of response tokens in all rows."""
        return int(self.response_mask_BS.sum())

    @property
    def matched_tokens(self) -> int:
        """Number of response tokens that end where one of the teacher's ends too."""
        if self.reading is None:
            return self.response_tokens
        return int(((self.reading.column_BS >= 0) & self.response_mask_BS).sum())

    def rows(self, index_B: Tensor) -> Rollout:
        """The given rows, trimmed to the longest of them."""
        width = int(self.lengths_B[index_B].max())
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        picked: dict[str, Any] = {k: v[index_B] for k, v in values.items() if isinstance(v, Tensor)}
        trimmed: dict[str, Any] = {k: v[:, :width] if "_BS" in k else v for k, v in picked.items()}
        reading = None if self.reading is None else self.reading.rows(index_B, width)
        return replace(self, **trimmed, reading=reading)

    def split(self, tokens_per_micro_batch: int) -> list[Rollout]:
        """Cut into microbatches of at most that many tokens, padding included, longest rows first.

        Rows of similar length share a microbatch, so little is spent on padding. A row that is longer than the
        budget gets a microbatch of its own. The loss does not depend on the split: its denominator is global.
        """
        order = torch.sort(self.lengths_B, descending=True, stable=True).indices
        lengths = self.lengths_B[order].tolist()
        micro_batches, start = [], 0
        while start < len(order):
            rows = max(1, tokens_per_micro_batch // lengths[start])
            micro_batches.append(self.rows(order[start : start + rows]))
            start += rows
        return micro_batches

    def without_truncated(self, policy: str) -> Rollout:
        """What is left to learn from when responses that hit the limit are not trusted.

        Args:
            policy: `keep` leaves everything; `mask` leaves the rows but none of their tokens; `drop` removes the rows,
                or all but one masked row where every response was cut. Losses do not tell `mask` from `drop`.
        """
        if policy == "keep" or not bool(self.truncated_B.any()):
            return self
        masked = replace(self, response_mask_BS=self.response_mask_BS & ~self.truncated_B[:, None])
        if policy == "mask":
            return masked
        whole_B = (~self.truncated_B).nonzero(as_tuple=True)[0]
        return masked.rows(whole_B if len(whole_B) else whole_B.new_zeros(1))

    def idle(self) -> Rollout:
        """A microbatch of one token of which nothing is selected, for a rank that has to keep pace with others."""
        row = self.rows(torch.zeros(1, dtype=torch.long, device=self.tokens_BS.device))
        tensors = {f.name: getattr(row, f.name) for f in fields(self) if "_BS" in f.name}
        cut = {name: value[:, :1] for name, value in tensors.items() if value is not None}
        nothing = torch.zeros_like(cut["response_mask_BS"])
        reading = None if row.reading is None else row.reading.idle()
        rest: dict[str, Any] = {"response_mask_BS": nothing, "lengths_B": torch.ones_like(row.lengths_B)}
        return replace(row, **cut | rest, reading=reading)


@dataclass(frozen=True)
class LayerPair:
    """A student block and the teacher block whose output it imitates, both counted from 1."""

    student: int
    teacher: int


@dataclass(frozen=True)
class Selection:
    """Which states of a microbatch enter the loss.

    Attributes:
        index_T: positions in the flattened [B * S] grid, ascending and unique.
        quarter_T: the quarter (0 to 3) of its response that each selected token lies in; metrics only.
        teacher_index_T: where the teacher has read as much: the same positions, or for one with another tokenizer those
            in its own [B * U] grid.
    """

    index_T: Tensor
    quarter_T: Tensor
    teacher_index_T: Tensor

    def __len__(self) -> int:
        return self.index_T.numel()


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of a microbatch, packed, in row-major order.

    Attributes:
        index_T: positions in the flattened [B * S] grid of the states that predict them.
        tokens_T: the sampled ids.
        sampler_logprobs_T: log-probabilities in nats that the sampler gave them.
        sampler_top_ids_TK: see `Rollout`.
        sampler_top_mass_T: see `Rollout`.
    """

    index_T: Tensor
    tokens_T: Tensor
    sampler_logprobs_T: Tensor
    sampler_top_ids_TK: Tensor | None = None
    sampler_top_mass_T: Tensor | None = None

    def __len__(self) -> int:
        return self.index_T.numel()

    def chunk(self, start: int, size: int) -> ResponseTokens:
        """`size` tokens from `start`, or what is left of them."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t[start : start + size] for name, t in tensors.items() if t is not None})


@dataclass(frozen=True)
class TeacherTargets:
    """What the teacher says about a microbatch.

    Attributes:
        states: by student layer, what it imitates at the selection of the hidden-state loss: the paired teacher
            layer's states [T, C], or their projections [T, R] on a bridge.
        final_TC: states after the final norm that predict the response tokens; None without a token loss.
    """

    states: dict[int, Tensor]
    final_TC: Tensor | None = None
