"""Finds graders that configs name, and calls them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from oprd_tune.config.components import find_function
from oprd_tune.errors import ConfigError, RolloutError
from oprd_tune.protocols import BatchGrader, Grader

_SHOWN = 80  # characters of a text in a message


def find_grader(key: str, grader: str | Grader) -> Grader:
    """A grader, given as itself or by its dotted path, that has been tried on one answer.

    Args:
        key: the config key, for messages.

    Raises:
        ConfigError: if it cannot be found, takes something else, lacks what it needs, such as a package, or gives no
            verdict. What it says of an answer that it did not expect is left for later.
    """
    found: Grader = find_function(key, grader)
    try:
        with suppress(ValueError):  # a function that is no Python need not tell
            inspect.signature(found).bind("", "")
    except TypeError as error:
        raise ConfigError(f"{key}: {_name(found)} takes other arguments; it must take (response, answer)") from error
    try:
        _verdict(found, found("1/2", "0.5"))  # takes whatever the grader needs
    except (ImportError, NameError, ChildProcessError, RolloutError) as error:
        raise ConfigError(f"{key}: {error}") from error
    except Exception:
        return found  # our answer is not one of the user's
    return found


def grade_all(grader: Grader, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether each response is right, for pairs (response, answer).

    Raises:
        RolloutError: if the grader fails, or gives no verdict.
    """
    if isinstance(grader, BatchGrader):
        try:
            found = list(grader.grade(pairs))
        except Exception as error:
            raise RolloutError(f"{_name(grader)} fails: {type(error).__name__}: {error}") from error
        if len(found) != len(pairs):
            raise RolloutError(f"{_name(grader)} gives {len(found)} verdicts on {len(pairs)} responses")
        return [_verdict(grader, verdict) for verdict in found]
    verdicts = []
    for response, answer in pairs:
        try:
            verdict = grader(response, answer)
        except Exception as error:
            texts = f"the response {response[:_SHOWN]!r} with the answer {answer[:_SHOWN]!r}"
            raise RolloutError(f"{_name(grader)} fails on {texts}: {type(error).__name__}: {error}") from error
        verdicts.append(_verdict(grader, verdict))
    return verdicts


def _verdict(grader: Grader, found: Any) -> bool:
    """True or False, also from 1, 0 and numbers of other libraries."""
    try:
        if found is not None and not isinstance(found, str) and found in (0, 1):
            return bool(found)
    except Exception:  # such as an array's, which is neither true nor false
        pass
    raise RolloutError(f"{_name(grader)} gives {found!r}, which is no verdict; it must give True or False")


def _name(grader: Grader) -> str:
    return f"the grader {getattr(grader, '__qualname__', type(grader).__qualname__)}"
