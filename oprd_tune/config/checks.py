"""Checks of single numbers. Each check has one message."""

from __future__ import annotations

import math

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


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
