"""The data of a training step as frozen dataclasses, and the letters that name tensor dimensions.

The names of tensors in this package end in one letter per dimension:

    B  sequences           T  selected response tokens, packed over the batch    V  vocabulary
    P  prompt tokens       L  tapped layer pairs                                 H  attention heads
    S  tokens of a row     D  student width        C  teacher width              K  top-k
    U  tokens of a row in the tokenizer of a teacher that has its own            R  rank of a bridge
    N  tokens of packed rows
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oprd_tune.packing import Packed, cut, filled


@dataclass(frozen=True)
class Prompts:
    """Tokenized prompts of one step.

    Attributes:
        tokens: token ids of each prompt; no prompt is empty.
        positions: index of each prompt in the run's endless stream of prompts. It does not depend on the number of
            ranks, and neither does sampling noise that is seeded with it.
        answers: reference answers; None for a prompt without one.
        teacher_tokens: the prompts as the teacher reads them, if it has another tokenizer or reads more; else None.
        teachers: the name of each prompt's teacher; None if there is one teacher.
    """

    tokens: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    answers: tuple[str | None, ...]
    teacher_tokens: tuple[tuple[int, ...], ...] | None = None
    teachers: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def among(self, positions: Collection[int]) -> Prompts:
        """The prompts at these positions of the stream, in their order here."""
        kept = [i for i, position in enumerate(self.positions) if position in positions]
        picked = {name: tuple(value[i] for i in kept) for name, value in vars(self).items() if value is not None}
        return replace(self, **picked)

    @property
    def as_teacher_reads(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of each prompt as the teacher reads them."""
        return self.tokens if self.teacher_tokens is None else self.teacher_tokens


@dataclass(frozen=True)
class SamplingRequest:
    """What a run asks of the engine that samples its responses.

    Attributes:
        stop_tokens: ids that end a response. The sampled stop token is part of the response.
        pad_id: id that pads rows to the length of the longest.
        max_prompt_tokens: length of the longest prompt, in tokens.
        max_new_tokens: longest response, in tokens. A response without a stop token is cut there and marked truncated.
        seed: seed of the sampling noise, which also depends on the step and on the sample's position in the run.
        vocabulary: sample only ids below this number, which the teacher knows too; None allows all ids.
        top_k_ids: how many of the most probable tokens to return with each sampled one; 0 returns none.
        temperature: sample at this temperature, 0 is greedy; None samples at the engine's own.
    """

    stop_tokens: Collection[int]
    pad_id: int
    max_prompt_tokens: int
    max_new_tokens: int
    samples_per_prompt: int = 1
    seed: int = 0
    vocabulary: int | None = None
    top_k_ids: int = 0
    temperature: float | None = None

    @property
    def longest_row(self) -> int:
        """The most tokens of a prompt and its response together."""
        return self.max_prompt_tokens + self.max_new_tokens


@dataclass(frozen=True)
class LogprobGap:
    """Mean and largest |Δ log p|, in nats, between sampler and trainer on `tokens` of all ranks, found in `seconds`."""

    mean: float
    largest: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Reading:
    """The rows of a rollout as a teacher with another tokenizer, or with other prompts, reads them.

    Attributes:
        tokens_BU: the teacher's token ids: prompt, response, right padding.
        lengths_B: number of teacher tokens in each row's prompt and response together.
        column_BS: for each column of the rollout, the matching teacher column: the one whose state has read exactly
            as much of the response. It is -1 where none matches, also in padding and before the prompt's last column.
        packed: as in `Rollout`, for `tokens_BU`.
    """

    tokens_BU: Tensor
    lengths_B: Tensor
    column_BS: Tensor
    packed: Packed | None = None

    def rows(self, index_B: Tensor, width: int) -> Reading:
        """The given rows: teacher tokens trimmed to the longest of them, and `column_BS` to the rollout's `width`."""
        lengths_B = self.lengths_B[index_B]
        tokens_BU = self.tokens_BU[index_B, : int(lengths_B.max()) if len(index_B) else 0]
        return Reading(tokens_BU=tokens_BU, lengths_B=lengths_B, column_BS=self.column_BS[index_B, :width])

    def within(self, context: int) -> Reading:
        """The reading cut to the teacher's `context`, in tokens. Columns that matched a cut token become -1."""
        column_BS = self.column_BS.where(self.column_BS < context, -1)
        return Reading(self.tokens_BU[:, :context], self.lengths_B.clamp(max=context), column_BS)

    def idle(self) -> Reading:
        """A reading of one row and one token, which every teacher has and no column matches."""
        one_B = torch.ones_like(self.lengths_B[:1])
        return Reading(torch.zeros_like(self.tokens_BU[:1, :1]), one_B, torch.full_like(self.column_BS[:1, :1], -1))


@dataclass(frozen=True)
class Rollout:
    """Prompts with sampled responses. Rows are right-padded, so a token's column is its rotary position.

    Attributes:
        tokens_BS: token ids: prompt, response, padding.
        response_mask_BS: True on response tokens, including a sampled EOS; False on padding.
        sampler_logprobs_BS: fp32 log-probabilities, in nats, that the sampler gave the response tokens; 0 elsewhere.
        lengths_B: number of tokens in each row's prompt and response together.
        truncated_B: True where the response hit the token limit instead of a stop token.
        prompt_positions_B: `Prompts.positions` of each row's prompt.
        policy_version: number of optimizer steps behind the weights that sampled.
        sampler_top_ids_BSK: the sampler's K most probable tokens at each response token; None unless requested.
        sampler_top_mass_BS: total probability of those K tokens.
        given_B: True where the data's reference answer stands in the place of a sample; None if all were sampled.
        advantage_B: each response's advantage by a task's reward; None if nothing was graded.
        logprob_gap: difference from the trainer, measured when an engine with its own weights samples.
        reading: the rows as the teacher reads them; None if both models read the same.
        teacher_B: the number of each row's teacher; None if there is one teacher.
        teacher: the number of the teacher that reads all rows of a microbatch; 0 if there is one.
        packed: how the student reads the rows of a microbatch without their padding; None if it reads them as they are.
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
    given_B: Tensor | None = None
    advantage_B: Tensor | None = None
    logprob_gap: LogprobGap | None = None
    reading: Reading | None = None
    teacher_B: Tensor | None = None
    teacher: int = 0
    packed: Packed | None = None

    def __len__(self) -> int:
        return self.tokens_BS.shape[0]

    @property
    def teacher_tokens(self) -> Tensor:
        """Token ids as the teacher reads them, right-padded."""
        return self.tokens_BS if self.reading is None else self.reading.tokens_BU

    @property
    def teacher_packed(self) -> Packed | None:
        """How a teacher reads `teacher_tokens` without their padding."""
        return self.packed if self.reading is None else self.reading.packed

    def states_at(self, index_T: Tensor) -> Tensor:
        """Where the states of these positions of the flattened grid [B * S] are among those that the student reads."""
        return index_T if self.packed is None else self.packed.at(index_T)

    def in_grid(self, index_T: Tensor) -> Tensor:
        """What `states_at` returned as positions of the flattened grid again."""
        return index_T if self.packed is None else self.packed.grid_N[index_T]

    def read_by(self, model: Any) -> Tensor:
        """What the student's model makes of the rows. Its taps get the states where `StateSelector` looks for them."""
        result: Tensor = model(self.tokens_BS) if self.packed is None else self.packed.read_by(model, self.tokens_BS)
        return result

    @property
    def response_tokens(self) -> int:
        """Number of response tokens in all rows."""
        return int(self.response_mask_BS.sum())

    @property
    def sampled(self) -> Rollout:
        """The rows that the student has sampled; there may be none."""
        return self if self.given_B is None else self.rows((~self.given_B).nonzero(as_tuple=True)[0])

    @property
    def matched_tokens(self) -> int:
        """Number of response tokens that end where a token of the teacher's also ends."""
        if self.reading is None:
            return self.response_tokens
        return int(((self.reading.column_BS >= 0) & self.response_mask_BS).sum())

    def rows(self, index_B: Tensor) -> Rollout:
        """The given rows, trimmed to the longest of them."""
        width = int(self.lengths_B[index_B].max()) if len(index_B) else 0
        picked: dict[str, Any] = {k: v[index_B] for k, v in vars(self).items() if isinstance(v, Tensor)}
        trimmed: dict[str, Any] = {k: v[:, :width] if "_BS" in k else v for k, v in picked.items()}
        reading = None if self.reading is None else self.reading.rows(index_B, width)
        return replace(self, **trimmed, reading=reading, packed=None)

    def of_teacher(self, number: int) -> Rollout:
        """The rows that a teacher reads; one idle row if there are none."""
        if self.teacher_B is None:
            return self
        index_B = (self.teacher_B == number).nonzero(as_tuple=True)[0]
        return replace(self.rows(index_B) if len(index_B) else self.idle(), teacher=number)

    def split(
        self, tokens_per_micro_batch: int, *, one_if_it_fits: bool = False, packed: bool = False
    ) -> list[Rollout]:
        """Cut into microbatches of at most `tokens_per_micro_batch` tokens of either model, longest rows first.

        A row that exceeds the budget gets one of its own. No split changes the loss, because its denominator is global.

        Args:
            one_if_it_fits: whether padded rows that fit into one microbatch stay in one, whatever padding they need.
            packed: whether models read the rows without padding.
        """
        longer_B = self.lengths_B if self.reading is None else self.lengths_B.maximum(self.reading.lengths_B)
        order = torch.sort(longer_B, descending=True, stable=True).indices
        lengths, budget = longer_B[order].tolist(), tokens_per_micro_batch
        if packed:
            return [self.rows(order[part]).without_padding() for part in filled(lengths, budget)]
        return [self.rows(order[part]) for part in cut(lengths, budget, one_if_it_fits=one_if_it_fits)]

    def without_padding(self) -> Rollout:
        """The rows for models that read them packed. The host waits for their lengths."""
        own, r = Packed.of(self.lengths_B, self.tokens_BS.shape[1]), self.reading
        reading = None if r is None else replace(r, packed=Packed.of(r.lengths_B, r.tokens_BU.shape[1]))
        return replace(self, reading=reading, packed=own)

    def without_truncated(self, policy: str) -> Rollout:
        """Apply the `policy` for truncated responses; `mask` and `drop` give the same losses.

        Args:
            policy: `keep` changes nothing. `mask` keeps the rows of truncated responses but clears their response
                mask. `drop` removes those rows; if every response was truncated, one masked row remains.
        """
        if policy == "keep" or not bool(self.truncated_B.any()):
            return self
        masked = replace(self, response_mask_BS=self.response_mask_BS & ~self.truncated_B[:, None])
        if policy == "mask":
            return masked
        whole_B = (~self.truncated_B).nonzero(as_tuple=True)[0]
        return masked.rows(whole_B if len(whole_B) else whole_B.new_zeros(1))

    def idle(self) -> Rollout:
        """A microbatch of one token that is not a response token, for a rank with fewer microbatches than others."""
        row = self.rows(torch.zeros(1, dtype=torch.long, device=self.tokens_BS.device))
        cut: dict[str, Any] = {k: v[:, :1] for k, v in vars(row).items() if "_BS" in k and v is not None}
        cut["response_mask_BS"] = torch.zeros_like(cut["response_mask_BS"])
        cut["lengths_B"] = torch.ones_like(row.lengths_B)
        return replace(row, **cut, reading=None if row.reading is None else row.reading.idle())


@dataclass(frozen=True)
class LayerPair:
    """A student block and the teacher block whose output it imitates. Blocks count from 1."""

    student: int
    teacher: int


@dataclass(frozen=True)
class TeacherTargets:
    """What the student is compared with on a microbatch.

    Attributes:
        states: targets of the hidden-state loss by student layer: the selected states [T, C] of the paired teacher
            layer or, with a bridge, their projections [T, R].
        final_TC: the teacher's normed final states that predict the response tokens; None without a token loss.
    """

    states: dict[int, Tensor]
    final_TC: Tensor | None = None
