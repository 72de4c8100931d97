"""Finds graders that configs name, and calls them."""

from __future__ import annotations

from collections.abc import Sequence

from oprd_tune.config.components import find_function
from oprd_tune.errors import ConfigError
from oprd_tune.protocols import BatchGrader, Grader


def find_grader(key: str, grader: str | Grader) -> Grader:
    """A grader, given as itself or by its dotted path, that has graded one answer.

    Args:
        key: the config key, for messages.

    Raises:
        ConfigError: if it cannot be found, or lacks what it needs, such as a package.
    """
    found: Grader = find_function(key, grader)
    try:
        found("1/2", "0.5")  # takes whatever the grader needs
    except (ImportError, ChildProcessError) as error:
        raise ConfigError(f"{key}: {error}") from error
    return found


def grade_all(grader: Grader, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether each response is right, for pairs (response, answer)."""
    if isinstance(grader, BatchGrader):
        return grader.grade(pairs)
    return [bool(grader(response, answer)) for response, answer in pairs]
