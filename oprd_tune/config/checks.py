"""Checks of single values. Each check has one message."""

from __future__ import annotations

import math
import types
from typing import Any, Union, get_args, get_origin

from oprd_tune.errors import ConfigError

MOST = 2**31 - 1  # larger counts only overflow in the libraries below


def check_whole(name: str, value: object, *, at_least: int = 1, at_most: int = MOST) -> None:
    """Raise ConfigError unless a value is a whole number within bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, at least {at_least}")
    if value > at_most:
        raise ConfigError(f"{name} is {value}; it must be a whole number, at most {at_most}")


def check_seed(name: str, value: object) -> None:
    """Raise ConfigError unless a value is a whole number that every generator takes as a seed."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number within 0 and 2**32 - 1")


def check_share(name: str, value: object) -> None:
    """Raise ConfigError unless a value is a number within 0 and 1."""
    if not _is_finite(value) or not 0 <= value <= 1:  # type: ignore[operator]
        raise ConfigError(f"{name} is {value!r}; it must lie within 0 and 1")


def check_positive(name: str, value: object) -> None:
    """Raise ConfigError unless a value is a finite number above 0."""
    if not _is_finite(value) or not value > 0:  # type: ignore[operator]
        raise ConfigError(f"{name} is {value!r}; it must be a finite number above 0")


def check_not_negative(name: str, value: object) -> None:
    """Raise ConfigError unless a value is a finite number, 0 or above."""
    if not _is_finite(value) or value < 0:  # type: ignore[operator]
        raise ConfigError(f"{name} is {value!r}; it must be a finite number, 0 or above")


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type, or a ConfigError. Whole numbers become floats where a float is wanted."""
    if hint is Any:
        return value
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if get_origin(option) is dict and isinstance(value, dict):
            return {str(key): typed(f"{name}.{key}", item, get_args(option)[1]) for key, item in value.items()}
        if get_origin(option) is list and isinstance(value, list):
            return [typed(name, item, get_args(option)[0]) for item in value]
        if isinstance(option, type) and isinstance(value, option) and (option is bool) == isinstance(value, bool):
            return value
    raise ConfigError(f"{name} is {value!r}; it must be {' or '.join(map(_in_words, options))}")


def _in_words(kind: Any) -> str:
    if kind is type(None):
        return "null"
    if get_origin(kind) is dict:
        return "a section of names and values"
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
