"""What the exchangeable pieces of a run have to offer. A class needs no base for it, only these members.

Each guide in CONTRIBUTING.md ("Add a loss", "Add an engine", …) starts from one of these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from oprd_tune.ranks import Ranks
from oprd_tune.types import Prompts, Rollout, SamplingRequest, TeacherTargets

# ---- sampling ----


@dataclass(frozen=True)
class Policy:
    """The student as a rollout engine gets it.

    Attributes:
        model: the trainer's own model, as it trains: sharded, checkpointed, with adapters.
        files: the checkpointer that it was loaded with.
        dtype: that it computes in.
        vocabulary: token ids that the teacher knows too.
        ranks: the processes that it is spread over.
        folder: where an engine may write, within the run's folder.
    """

    model: TransformerDecoder
    files: Any
    dtype: torch.dtype
    vocabulary: int
    ranks: Ranks
    folder: Path


class RolloutEngine(Protocol):
    """Samples responses with the student's weights. Constructed from its section of the config alone.

    A run calls `check`, `memory_bytes`, `start`, then `sync_weights` and `generate` in every step, and `close`.

    Attributes:
        samples_with_student: whether the trainer's own model samples, so that there is no other engine to correct for.
        temperature: that it samples at; 1 is on-policy.
        free_on_resume: arguments that may change when a run resumes: those that decide where and how fast it samples,
            not what.
    """

    samples_with_student: ClassVar[bool]
    free_on_resume: ClassVar[Collection[str]]
    temperature: float

    def check(self, device: torch.device, ranks: Ranks) -> None:
        """Raise ConfigError, before any model is loaded, if the engine cannot work here. Every rank calls."""

    def memory_bytes(
        self, model: TransformerDecoder, *, rows: int, columns: int, dtype: torch.dtype
    ) -> tuple[int, int]:
        """Bytes on each rank's device, beside the student: held all the time, and only while sampling.

        Args:
            model: the student, possibly on the meta device.
            rows: responses of a rank's largest rollout.
            columns: tokens of its longest row, prompt included.
            dtype: that the student computes in.
        """

    def start(self, policy: Policy, request: SamplingRequest) -> None:
        """Get ready to sample. Every rank calls.

        Raises:
            ConfigError: if the engine cannot start.
        """

    def sync_weights(self, policy_version: int) -> None:
        """Take over the trainer's weights; rollouts carry `policy_version` from now on.

        Raises:
            RolloutError: if that fails.
        """

    def generate(self, prompts: Prompts, *, stream: int = 0) -> Rollout:
        """Sample responses to each prompt, rows of one prompt side by side.

        Args:
            prompts: what to answer.
            stream: separates the noise of otherwise equal calls, such as training steps.

        Raises:
            RolloutError: if that fails, or if the responses are not proven to be the current student's.
        """

    def close(self) -> None:
        """Free what the engine holds. It cannot be used afterwards."""


# ---- what the student is compared with ----


class Teacher(Protocol):
    """Says what the student should have said."""

    def targets(self, tokens_BS: Tensor, index_T: Tensor, final_index_T: Tensor | None = None) -> TeacherTargets:
        """What the losses compare the student with.

        Args:
            tokens_BS: right-padded token ids, as the teacher reads them.
            index_T: positions in the flattened [B * S] grid, for the layers of a hidden-state loss.
            final_index_T: positions of the final states, for a token loss; None without one.
        """


class Projections(Protocol):
    """Makes states of unlike models comparable: what a hidden-state loss needs of a bridge."""

    def student(self, layer: int, state_TD: Tensor) -> Tensor:
        """A student layer's states, [T, R]."""

    def teacher(self, layer: int, state_TC: Tensor) -> Tensor:
        """The states of the teacher layer that this student layer is paired with, [T, R]."""

    def variance(self, layer: int) -> Tensor:
        """E‖z_T‖² of the teacher's projections, a scalar."""


class LossStream(Protocol):
    """One microbatch of a loss. The taps call it with each layer that it reads, in ascending order.

    Attributes:
        layers: those layers, ascending.
        metrics: sums over the microbatch's tokens, by name; complete after the last call.
    """

    @property
    def layers(self) -> Collection[int]: ...

    @property
    def metrics(self) -> Any: ...

    def __call__(self, layer: int, state_BSD: Tensor) -> Tensor:
        """Take one layer's output; the last call returns the sum, or those of several parts, with a graph."""


# ---- data and evaluation ----


class Tokenizer(Protocol):
    """Turns texts into the tokens that both models know, and back. torchtune's tokenizers serve, and ours.

    Attributes:
        eos_id: ends a reference answer.
        pad_id: fills rows.
        stop_tokens: every id that ends a response.
    """

    eos_id: int
    pad_id: int
    stop_tokens: Collection[int]

    def encode(self, text: str, add_bos: bool, add_eos: bool) -> list[int]: ...

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str: ...

    def tokenize_messages(self, messages: list[Any], *, add_eos: bool) -> tuple[list[int], list[bool]]:
        """Ids of a chat, and which of them are masked. An empty last assistant message asks for its header."""


class PromptSource(Protocol):
    """Tokenized prompts with reference answers. The function that a config names returns one; see `prompt_dataset`.

    It is called with the tokenizer and `max_prompt_tokens`, and with `teacher_tokenizer` where there is one.

    Attributes:
        dropped: how many prompts were left out, empty or too long; said at the start.
        largest_token: the largest token id in any prompt; the models have to know it.
        longest_teacher_prompt: tokens of the longest prompt that a teacher with another tokenizer reads, or None.
        has_answers: whether every prompt has a reference answer.
    """

    dropped: int
    largest_token: int
    longest_teacher_prompt: int | None

    @property
    def has_answers(self) -> bool: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[tuple[int, ...], str | None]:
        """Prompt tokens and reference answer."""

    def teacher_prompt(self, index: int) -> tuple[int, ...] | None:
        """The prompt in the teacher's own tokens; None if it reads the student's."""

    def answer_tokens(self, index: int) -> tuple[int, ...]:
        """The reference answer as the response it should have been: its tokens and EOS."""

    def as_teacher_reads(self) -> PromptSource:
        """The same prompts and answers in the teacher's tokens; itself if it reads the student's."""


class Grader(Protocol):
    """Says whether a response is right."""

    def __call__(self, response: str, answer: str, /) -> bool: ...


# ---- logging ----


class MetricLogger(Protocol):
    """What every logger of torchtune's offers. One that also is a `RichLogger` gets texts and figures."""

    def log_dict(self, payload: Mapping[str, float], step: int) -> None: ...

    def log_config(self, config: Any) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class RichLogger(Protocol):
    """A logger that takes texts and figures, and that can go on where a checkpoint was."""

    def resume_at(self, step: int) -> None:
        """Hide everything logged at `step` or later. Called before the first entry."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Log a text; Markdown is rendered."""

    def log_figure(self, name: str, figure: Any, step: int) -> None:
        """Log a matplotlib figure."""
