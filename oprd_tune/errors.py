"""The exceptions that a user is meant to read. Recipes print them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A mistake in the user's input. The message says what was given, what is allowed and what to do. Exit status 2."""


class DamagedCheckpoint(ConfigError):  # noqa: N818 - it says what is wrong
    """A checkpoint is not as it was written. The message names the file."""


class NothingLeftToDo(Exception):  # noqa: N818 - not an error
    """The user's request was finished before training began. Recipes print the message and exit with status 0."""


class RolloutError(RuntimeError):
    """The engine gave no responses, nothing proves that the current student gave them, or a grader gave no verdict.

    It is raised before a step changes anything. Recipes save and exit with status 1.
    """


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Recipes exit with status 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the most similar known word, or at all known words if none is similar."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
