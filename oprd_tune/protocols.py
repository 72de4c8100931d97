"""What the exchangeable pieces of a run have to offer. A class needs no base class for it, only these members.

Each guide in CONTRIBUTING.md ("Add a loss", "Add an engine", …) starts from one of these protocols.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
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
        model: the trainer's own model in the form that it trains in: sharded, checkpointed, with adapters.
        files: the checkpointer that loaded the model.
        dtype: the precision that the model computes in.
        vocabulary: the number of token ids that the teacher knows too. An engine samples from these alone.
        ranks: the processes that the model is spread over.
        folder: a folder within the run's folder, where the engine may write.
    """

    model: TransformerDecoder
    files: Any
    dtype: torch.dtype
    vocabulary: int
    ranks: Ranks
    folder: Path


class RolloutEngine(Protocol):
    """Samples responses with the student's weights. An engine is constructed from its section of the config alone.

    A run calls `check`, `memory_bytes` and `start`, then `sync_weights` and `generate` in every step, and `close` at
    the end. To answer benchmarks (the section `eval`), it calls `sync_weights` once and then `generate` several times,
    with a request of its own.

    Attributes:
        samples_with_student: True if the trainer's own model samples. Losses then have no other sampler to correct for.
        free_on_resume: the engine's arguments that may change when a run resumes. They decide where and how fast the
            engine samples, but not what it samples.
        temperature: the sampling temperature; 1 is on-policy.
    """

    samples_with_student: ClassVar[bool]
    free_on_resume: ClassVar[Collection[str]]
    temperature: float

    def check(self, device: torch.device, ranks: Ranks) -> None:
        """Raise ConfigError, before any model is loaded, if the engine cannot work here. Every rank calls."""

    def memory_bytes(
        self, model: TransformerDecoder, *, rows: int, columns: int, dtype: torch.dtype
    ) -> tuple[int, int]:
        """Bytes that the engine needs on each rank's device, beside the student: all the time, and while it samples.

        Args:
            model: the student, possibly on the meta device.
            rows: the number of responses in a rank's largest rollout.
            columns: the length of the longest row in tokens, prompt included.
            dtype: the precision that the student computes in.
        """

    def start(self, policy: Policy, request: SamplingRequest, *others: SamplingRequest) -> None:
        """Get ready to sample; raise ConfigError if that fails. Every rank calls.

        Args:
            policy: the student.
            request: what training samples.
            others: what `generate` may be asked for instead. An engine whose memory or context is fixed from here on
                has to make room for the longest row of all of them. An engine that never evaluates need not take any.
        """

    def sync_weights(self, policy_version: int) -> None:
        """Take over the trainer's weights, or raise RolloutError. Later rollouts carry `policy_version`."""

    def generate(self, prompts: Prompts, *, stream: int = 0, request: SamplingRequest | None = None) -> Rollout:
        """Sample responses to each prompt. The rows of one prompt lie side by side.

        Args:
            prompts: the prompts to answer.
            stream: separates the noise of otherwise equal calls. A run passes the training step.
            request: one of the `others` that `start` was given, for this call alone; None samples for training. It must
                not change what later calls sample.

        Raises:
            RolloutError: if sampling fails, or if nothing proves that the current student gave the responses.
        """

    def close(self) -> None:
        """Free what the engine holds. The engine cannot be used afterwards."""


@runtime_checkable
class DecodesItself(Protocol):
    """A model with a key-value cache of its own, beside torchtune's decoders.

    Attributes:
        cached_numbers: how many numbers a block keeps of each token.
    """

    @property
    def cached_numbers(self) -> int: ...

    def decoding(self, visible_BP: Tensor, max_new_tokens: int) -> AbstractContextManager[Any]:
        """A scope in which `model(tokens, mask=cache.mask(n), input_pos=…)` continues left-padded rows by n columns.

        It gives the cache, with the members `mask`, `advance` and `keep_rows` of the native engine's `DecodingCache`.
        """


# ---- what the student is compared with ----


class Teacher(Protocol):
    """Gives the states that the student should have had."""

    def targets(self, tokens_BS: Tensor, index_T: Tensor, final_index_T: Tensor | None = None) -> TeacherTargets:
        """The teacher's states, with which the losses compare the student.

        Args:
            tokens_BS: right-padded token ids, as the teacher reads them.
            index_T: positions in the flattened [B * S] grid, for the layers of a hidden-state loss.
            final_index_T: positions of the final states, for a token loss; None without a token loss.
        """


@runtime_checkable
class TeacherFiles(Protocol):
    """A teacher's folder that loads itself, in the place of torchtune's checkpointer.

    Attributes:
        folder: the model's folder.
        weight_files: the files that hold its weights.
    """

    folder: Path
    weight_files: list[Path]

    def check_weights(self, name: str, model: Any) -> None:
        """Compare the files with a model on the meta device, before weights are read; raise ConfigError.

        `name` is the config key, for messages.
        """

    def load_teacher(self, *, dtype: torch.dtype, top: int | None, placing: Any) -> tuple[Any, dict[int, float]]:
        """Load the teacher, frozen, and by layer the error of its quantisation.

        Args:
            dtype: the dtype of everything that is not quantised.
            top: the highest layer to load; None loads everything.
            placing: an `oprd_tune.teacher.block_placement.Placing`.
        """


class Projections(Protocol):
    """Makes states of unlike models comparable. A hidden-state loss needs these members of a bridge."""

    def student(self, layer: int, state_TD: Tensor) -> Tensor:
        """The projected states of a student layer, [T, R]. Autograd differentiates it in the backward pass."""

    def teacher(self, layer: int, state_TC: Tensor) -> Tensor:
        """The projected states, [T, R], of the teacher layer that this student layer is paired with."""

    def variance(self, layer: int) -> Tensor:
        """E‖z_T‖² of the teacher's projections, a scalar."""


class LossStream(Protocol):
    """One microbatch of a loss. The taps call it once for each layer that it reads, in ascending order."""

    @property
    def layers(self) -> Collection[int]:
        """The student layers that the loss reads, ascending."""

    @property
    def metrics(self) -> Any:
        """Sums over the microbatch's tokens, by name. They are complete after the last call."""

    def __call__(self, layer: int, state_BSD: Tensor) -> Tensor:
        """Take one layer's output. The last call returns the loss sum with a graph, or one sum for each part."""


# ---- data and evaluation ----


class Tokenizer(Protocol):
    """Turns texts into the tokens that both models know, and back. torchtune's tokenizers and ours fit.

    Data sets ask a tokenizer that also has `encode_batch(texts)` and `tokenize_chats(chats)`, as ours has, for many
    prompts at once. A chat is a list of mappings with `role` and `content` there; the result is a list of ids for each.

    Attributes:
        eos_id: the id that ends a reference answer.
        pad_id: the id that fills rows.
        stop_tokens: every id that ends a response.
    """

    eos_id: int
    pad_id: int
    stop_tokens: Collection[int]

    def encode(self, text: str, add_bos: bool, add_eos: bool) -> list[int]: ...

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str: ...

    def tokenize_messages(self, messages: list[Any], *, add_eos: bool) -> tuple[list[int], list[bool]]:
        """The ids of a chat, and a mask of its ids. An empty last assistant message asks for the header alone."""


class PromptSource(Protocol):
    """Tokenized prompts with reference answers. The function that a config names returns one; see `prompt_dataset`.

    The function is called with the tokenizer and `max_prompt_tokens`, and with `teacher_tokenizer` where there is one.

    Attributes:
        dropped: how many prompts were left out because they were empty or too long. The run reports it at the start.
        largest_token: the largest token id in any prompt. The models must know it.
        longest_teacher_prompt: the longest prompt in tokens of a teacher with another tokenizer; None without such a
            teacher.
    """

    dropped: int
    largest_token: int
    longest_teacher_prompt: int | None

    @property
    def has_answers(self) -> bool:
        """Whether every prompt has a reference answer."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[tuple[int, ...], str | None]:
        """A prompt's tokens and its reference answer."""

    def teacher_prompt(self, index: int) -> tuple[int, ...] | None:
        """The prompt in the teacher's own tokens; None if the teacher reads the student's tokens."""

    def answer_tokens(self, index: int) -> tuple[int, ...]:
        """The reference answer as a response: its tokens and EOS."""

    def as_teacher_reads(self) -> PromptSource:
        """The same prompts and answers in the teacher's tokens; itself if the teacher reads the student's tokens."""


class Grader(Protocol):
    """Says whether a response is right."""

    def __call__(self, response: str, answer: str, /) -> bool: ...


@runtime_checkable
class BatchGrader(Protocol):
    """A grader that is quicker for many responses at once. A plain function is no such grader, and needs not be."""

    def __call__(self, response: str, answer: str, /) -> bool: ...

    def grade(self, pairs: Sequence[tuple[str, str]], /) -> list[bool]:
        """Whether each response is right, for pairs (response, answer)."""


# ---- logging ----


class MetricLogger(Protocol):
    """The members that every torchtune logger has. A logger that also is a `RichLogger` gets texts and figures too."""

    def log_dict(self, payload: Mapping[str, float], step: int) -> None: ...

    def log_config(self, config: Any) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class RichLogger(Protocol):
    """A logger that takes texts and figures, and that can continue from a checkpoint's step."""

    def resume_at(self, step: int) -> None:
        """Hide everything that was logged at `step` or later. A run calls this before the first entry."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Log a text. Markdown is rendered."""

    def log_figure(self, name: str, figure: Any, step: int) -> None:
        """Log a matplotlib figure."""
