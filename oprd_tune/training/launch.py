"""From `tune run` to a recipe and back to the shell: messages, exit codes, signals."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Protocol

from omegaconf import DictConfig

from oprd_tune.errors import ConfigError

_USER_ERROR = 2


class Recipe(Protocol):
    """What every recipe class offers."""

    def setup(self) -> None:
        """Check, load, prepare."""

    def train(self) -> int:
        """Run to the end; returns the exit status."""


def run_recipe(make_recipe: Callable[[DictConfig], Recipe], cfg: DictConfig) -> int:
    """Run a recipe; returns the process's exit status.

    What the user got wrong is printed as one message, without a traceback.
    """
    try:
        recipe = make_recipe(cfg)
        recipe.setup()
        return recipe.train()
    except KeyboardInterrupt:
        print("\ninterrupted; what was saved before is kept, and resume=true continues from there", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ConfigError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _USER_ERROR


class StopSignals:
    """Within the scope, Ctrl-C and SIGTERM ask the loop to stop after its step; a second one stops at once.

    Attributes:
        received: the signal's number, or 0.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> StopSignals:
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for s, handler in self._previous.items():
            signal.signal(s, handler)
        name = signal.Signals(number).name
        print(f"\n{name}: finishing the step, then saving; once more to stop at once", file=sys.stderr)

    @property
    def exit_status(self) -> int:
        """What the shell expects: 0, or 128 and the signal's number."""
        return 128 + self.received if self.received else 0
