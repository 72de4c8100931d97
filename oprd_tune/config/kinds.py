"""Compares an argument of a config with the annotation of the parameter that it is for."""

from __future__ import annotations

import collections.abc
import inspect
import math
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from oprd_tune.errors import ConfigError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Collection, collections.abc.Iterable)
_SECTIONS = (dict, collections.abc.Mapping)
_OURS = "oprd_tune."


def annotations_of(target: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function's parameters, or of those of a class; none if they cannot be resolved."""
    while isinstance(target, partial):
        target = target.func
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # annotations of another library may name what was imported for its type checker alone
        return {}


def check_argument(name: str, value: Any, hint: Any, *, path: str, default: Any = inspect.Parameter.empty) -> None:
    """Raise ConfigError if a value of a config cannot be what a parameter takes.

    Args:
        name: the config key.
        value: plain values. Components within are not looked at: nobody knows yet what they give.
        hint: the parameter's annotation. What is no plain kind, such as a class, takes any value but true and
            false. In this package it takes none: there, only a component makes an object.
        path: the component's dotted path.
        default: the parameter's default, which is always fine.
    """
    ours = path.startswith(_OURS)
    if value is default or _fits(value, hint, ours=ours):
        return
    if not ours and (value is None or (_is_plain(default) and not _fits(default, hint, ours=False))):
        return  # other libraries write annotations that their own defaults do not fit, and leave out None
    shown = repr(value)
    hidden = ""
    if isinstance(value, dict) and value and not any(value.values()) and _fits("", hint, ours=ours):
        text = "{" + ", ".join(value) + "}"
        hidden = f"; on the command line, a text with braces needs two pairs of quotes: {name}=\"'{text}'\""
    raise ConfigError(
        f"{name} is {shown if len(shown) < 200 else shown[:200] + '…'}; it must be {_in_words(hint)}{hidden}"
    )


def _fits(value: Any, hint: Any, *, ours: bool) -> bool:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Any, object) or not _is_plain(value):
        return True
    if kind in (Union, types.UnionType):
        return any(_fits(value, option, ours=ours) for option in inner)
    if kind is Literal:
        return value in inner
    if hint is None or hint is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole or (kind is float and isinstance(value, float) and not math.isnan(value))
    if kind is str:
        return isinstance(value, str)
    if kind in _LISTS:
        return isinstance(value, list) and _items_fit(value, kind, inner, ours=ours)
    if kind in _SECTIONS:
        return isinstance(value, Mapping) and (
            len(inner) < 2 or all(_fits(item, inner[1], ours=ours) for item in value.values())
        )
    if getattr(kind, "__name__", None) == "Tensor":  # torch takes numbers in its place, but no texts
        return not isinstance(value, (bool, str))
    return not inspect.isclass(kind) or not (ours or isinstance(value, bool))


def _items_fit(value: list[Any], kind: Any, inner: tuple[Any, ...], *, ours: bool) -> bool:
    if kind is tuple and inner and Ellipsis not in inner:
        return len(value) == len(inner) and all(
            _fits(item, option, ours=ours) for item, option in zip(value, inner, strict=True)
        )
    return not inner or all(_fits(item, inner[0], ours=ours) for item in value)


def _is_plain(value: Any) -> bool:
    """Whether a value is what a config itself can hold; a component is not."""
    return value is None or isinstance(value, (bool, int, float, str, list, dict))


def _in_words(hint: Any) -> str:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, inner)))
    if kind is Literal:
        return " or ".join(map(repr, inner))
    if kind in _WORDS:
        return _WORDS[kind]
    if kind in _LISTS:
        size = f" of {len(inner)}" if kind is tuple and inner and Ellipsis not in inner else ""
        of = f", each {_in_words(inner[0])}" if inner else ""
        return f"a list{size}{of}"
    if kind in _SECTIONS:
        return "a section"
    return f"a component that gives a {getattr(kind, '__name__', kind)}"
