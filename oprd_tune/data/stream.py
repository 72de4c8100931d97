"""The order of prompts: an endless, shuffled stream in which a seed and a position determine the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from oprd_tune.errors import ConfigError
from oprd_tune.protocols import PromptSource
from oprd_tune.types import Prompts


class PromptStream:
    """Shuffled passes over a data set of n prompts, one after the other.

    Position p of the stream is entry p mod n of a permutation, which depends on the seed and on p div n. So a run can
    resume from one number, on any number of ranks, and no prompt comes twice within a pass.

    Args:
        prompts_per_step: prompts of one optimizer step, over all ranks.

    Raises:
        ConfigError: if a rank would get no prompt.
    """

    def __init__(
        self, dataset: PromptSource, *, prompts_per_step: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if prompts_per_step < world_size:
            raise ConfigError(
                f"prompts_per_step is {prompts_per_step}, but there are {world_size} processes, each of which needs a "
                "prompt; raise it, or start fewer processes"
            )
        self._dataset = dataset
        self._teacher_of: Callable[[int], str] | None = getattr(dataset, "teacher_of", None)
        self._prompts_per_step = prompts_per_step
        self._rank, self._world_size = rank, world_size
        size = len(dataset)

        @lru_cache(maxsize=2)
        def permutation(epoch: int) -> list[int]:
            generator = torch.Generator().manual_seed((seed << 20) + epoch)
            return torch.randperm(size, generator=generator).tolist()

        self._permutation = permutation

    def __len__(self) -> int:
        """The number of prompts in one pass."""
        return len(self._dataset)

    def at_step(self, step: int) -> Prompts:
        """This rank's prompts of optimizer step `step`, counted from 0."""
        start = step * self._prompts_per_step
        positions = range(start + self._rank, start + self._prompts_per_step, self._world_size)
        return self.at(positions)

    def at(self, positions: Sequence[int]) -> Prompts:
        """The prompts at given positions of the stream."""
        size = len(self._dataset)
        indices = [self._permutation(p // size)[p % size] for p in positions]
        rows = [self._dataset[index] for index in indices]
        read = [prompt for index in indices if (prompt := self._dataset.teacher_prompt(index)) is not None]
        return Prompts(
            tokens=tuple(tokens for tokens, _ in rows),
            positions=tuple(positions),
            answers=tuple(answer for _, answer in rows),
            teacher_tokens=tuple(read) or None,
            teachers=None if self._teacher_of is None else tuple(map(self._teacher_of, indices)),
        )

    def answer_tokens(self, position: int) -> tuple[int, ...]:
        """The reference answer to the prompt at a position of the stream: its tokens and EOS."""
        size = len(self._dataset)
        return self._dataset.answer_tokens(self._permutation(position // size)[position % size])
