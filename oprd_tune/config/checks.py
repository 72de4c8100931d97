"""Checks of single numbers. Each check has one message."""

from __future__ import annotations

import math

from oprd_tune.errors import ConfigError


def check_whole(name: str, value: object, *, at_least: int = 1) -> None:
    """Raise ConfigError unless a value is a whole number and is not too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, at least {at_least}")


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
