"""The rollouts of a run's steps: sampled when the step comes or, one step ahead, while the step before trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from oprd_tune.data.stream import PromptStream
from oprd_tune.errors import RolloutError
from oprd_tune.protocols import RolloutEngine
from oprd_tune.ranks import Ranks
from oprd_tune.types import LogprobGap, Prompts, Rollout


class SamplesAhead(RolloutEngine, Protocol):
    """An engine that can sample while the student trains, because it has devices of its own.

    Attributes:
        ahead: 1 if the run should use that, else 0.
    """

    ahead: int

    def ask(self, prompts: Prompts, *, stream: int) -> None:
        """Begin to sample with the weights of the last sync, proving that it has them, and return.

        Raises:
            RolloutError: as `generate` does.
        """

    def take(self) -> Rollout | None:
        """Wait for what was asked for, and return it; None if nothing was.

        A sync in between waits too, and does not change what was asked for. Every rank calls.

        Raises:
            RolloutError: as `generate` does.
        """


class Rollouts:
    """Samples the responses of each step. With `ahead`, its state is the rollout of the next step.

    Args:
        prompts: the stream from which the run takes the prompts of its steps.
        last: the number of steps in the run. Nothing is asked for beyond the last.
        phase: times a scope, as `PhaseTimer` does.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: PromptStream,
        ranks: Ranks,
        *,
        last: int,
        phase: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._engine, self._prompts, self._ranks, self._last, self._phase = engine, prompts, ranks, last, phase
        self._ahead: Any = engine if getattr(engine, "ahead", 0) else None
        self._next: Rollout | None = None  # of the next step, once it is there
        self._everyones: list[Rollout] = []

    @property
    def ahead(self) -> bool:
        """Whether responses are sampled one step ahead."""
        return self._ahead is not None

    def of_step(self, step: int, prompts: Prompts) -> Rollout:
        """The rollout of a step, counted from 0, to its prompts. Every rank calls, step by step.

        With `ahead`, the next step's responses are asked for.

        Raises:
            RolloutError: if sampling fails, or if the responses are not those of this step's policy or, with `ahead`,
                of the one before.
        """
        sampled = None
        if self._ahead:
            with self._phase("wait"):
                sampled = self._take(step, prompts)
        with self._phase("sync"):
            self._engine.sync_weights(step)
        if sampled is None:
            with self._phase("rollout"):
                sampled = self._engine.generate(prompts, stream=step)
        if self._ahead and step + 1 < self._last:
            with self._phase("wait"):
                self._ahead.ask(self._prompts.at_step(step + 1), stream=step + 1)
        return sampled

    def _take(self, step: int, prompts: Prompts) -> Rollout | None:
        """What was asked for in the step before, or None in a run's first step."""
        self.settle()
        taken, self._next = self._next, None
        if taken is None:
            return None
        if step - taken.policy_version != 1:
            raise RolloutError(
                f"the rollout of step {step + 1} was sampled with policy version {taken.policy_version}; with "
                f"rollout.ahead=1 it has to be version {step - 1}, exactly one behind"
            )
        if set(taken.prompt_positions_B.tolist()) != set(prompts.positions):
            raise RolloutError(
                "rollout.ahead=1 has sampled other prompts than those of this step; take them from the run's stream, "
                "as the shipped recipes do, or set it to 0"
            )
        return taken

    def settle(self) -> None:
        """Wait for what was asked for, if anything was. Every rank calls."""
        if self._ahead and (taken := self._ahead.take()) is not None:
            self._next = taken

    def gather(self) -> None:
        """Bring the next step's rollout together for `state_dict`. Every rank calls."""
        self.settle()
        own = None if self._next is None else _on(self._next, torch.device("cpu"))
        self._everyones = [each for each in self._ranks.collect(own) if each is not None]

    def state_dict(self) -> dict[str, Any]:
        """The rollouts of all ranks, as `gather` found them."""
        return {"next": [_as_plain(rollout) for rollout in self._everyones]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's rows of the next step's rollout, whichever ranks have sampled them."""
        found = [_from_plain(plain) for plain in state["next"]]
        if found:
            policy = found[0].policy_version
            positions = self._prompts.at_step(policy + 1).positions
            own = _rows_of(_joined(found), positions)
            self._next = _on(own, self._ranks.device)


def _as_plain(rollout: Rollout) -> dict[str, Any]:
    """A rollout as tensors and numbers, which a checkpoint may hold."""
    gap = rollout.logprob_gap
    return {**vars(rollout), "logprob_gap": None if gap is None else vars(gap)}


def _from_plain(plain: dict[str, Any]) -> Rollout:
    gap = plain["logprob_gap"]
    return Rollout(**{**plain, "logprob_gap": None if gap is None else LogprobGap(**gap)})


def _on(rollout: Rollout, device: torch.device) -> Rollout:
    """The rollout on a device."""
    moved = {name: value.to(device) for name, value in vars(rollout).items() if isinstance(value, Tensor)}
    return replace(rollout, **moved)  # type: ignore[arg-type]


def _joined(rollouts: list[Rollout]) -> Rollout:
    """The rows of all rollouts, one after the other, padded with zeros."""
    width = max(rollout.tokens_BS.shape[1] for rollout in rollouts)
    joined: dict[str, Tensor] = {}
    for name in (field.name for field in fields(Rollout)):
        parts = [getattr(rollout, name) for rollout in rollouts]
        if isinstance(parts[0], Tensor):
            if "_BS" in name:
                parts = [torch.cat([part, part.new_zeros(_missing(part, width))], dim=1) for part in parts]
            joined[name] = torch.cat(parts)
    return replace(rollouts[0], **joined)  # type: ignore[arg-type]


def _missing(part: Tensor, width: int) -> tuple[int, ...]:
    """The shape of the columns that a part lacks."""
    return (part.shape[0], width - part.shape[1], *part.shape[2:])


def _rows_of(rollout: Rollout, positions: tuple[int, ...]) -> Rollout:
    """The rows of some prompts, in their order."""
    rows = rollout.prompt_positions_B.tolist()
    chosen = [row for position in positions for row, found in enumerate(rows) if found == position]
    return rollout.rows(torch.tensor(chosen))
