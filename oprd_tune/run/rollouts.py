"""The rollouts of a run's steps: sampled when the step comes or, one step ahead, while the step before trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from oprd_tune.data.stream import PromptStream
from oprd_tune.errors import RolloutError
from oprd_tune.protocols import RolloutEngine
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.responses import joined, rows_of
from oprd_tune.training.references import References
from oprd_tune.types import LogprobGap, Prompts, Rollout


class SamplesAhead(RolloutEngine, Protocol):
    """An engine that can sample while the student trains, because it has devices of its own.

    Attributes:
        ahead: 1 if the run should use that, else 0.
    """

    ahead: int

    def ask(self, prompts: Prompts, *, stream: int) -> None:
        """Begin to sample with the weights of the last sync, and return."""

    def prove(self) -> None:
        """Prove that what was asked for is sampled with the student's present weights, before they change.

        Every rank calls. Without anything to prove, it does nothing.

        Raises:
            RolloutError: if nothing proves it. What was asked for is then forgotten.
        """

    def take(self) -> Rollout | None:
        """Wait for what was asked for, and return it; None if nothing was.

        A sync in between waits too, and does not change what was asked for. Every rank calls.

        Raises:
            RolloutError: as `generate` does.
        """


class Rollouts:
    """Samples the responses of each step. With `ahead`, its state is what was sampled for the next step.

    Args:
        prompts: the stream from which the run takes the prompts of its steps.
        last: the number of steps in the run. Nothing is asked for beyond the last.
        phase: times a scope, as `PhaseTimer` does.
        references: put the data's answers in the place of some samples; None samples all.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: PromptStream,
        ranks: Ranks,
        *,
        last: int,
        phase: Callable[[str], AbstractContextManager[None]],
        references: References | None = None,
    ) -> None:
        self._engine, self._prompts, self._ranks, self._last, self._phase = engine, prompts, ranks, last, phase
        self._references = references
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
        asked, following = self._to_sample(step, prompts), None
        sampled = None
        if self._ahead:
            with self._phase("wait"):
                sampled = self._take(step, asked)
            following = self._to_sample(step + 1, self._prompts.at_step(step + 1)) if step + 1 < self._last else None
        if (asked and sampled is None) or following:
            with self._phase("sync"):
                self._engine.sync_weights(step)
        if asked and sampled is None:
            with self._phase("rollout"):
                sampled = self._engine.generate(asked, stream=step)
        if following:
            with self._phase("wait"):
                self._ahead.ask(following, stream=step + 1)
        if self._references is None:
            assert sampled is not None
            return sampled
        return self._references.beside(sampled, prompts, step)

    def _to_sample(self, step: int, prompts: Prompts) -> Prompts:
        """The prompts of a step whose answers are not taken from the data. If one rank has none, no rank has."""
        return prompts if self._references is None else self._references.to_sample(prompts, step)

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

    def prove(self) -> None:
        """Prove what was asked for, before the student changes. Every rank calls."""
        if self._ahead:
            self._ahead.prove()

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
            step, rows = found[0].policy_version + 1, joined(found)
            own = self._to_sample(step, self._prompts.at_step(step))
            missing = set(own.positions) - set(rows.prompt_positions_B.tolist())
            if not self._ranks.sum(len(missing)):  # other numbers of ranks may share a step with references otherwise
                self._next = _on(rows_of(rows, own.positions), self._ranks.device)


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
