"""Components: the config's sections with a `_component_`. They are found and checked first, and constructed later."""

from __future__ import annotations

import difflib
import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from oprd_tune.config.kinds import annotations_of, check_argument
from oprd_tune.errors import ConfigError, nearest
from oprd_tune.torchtune_compat import component_at


@dataclass(frozen=True)
class Component:
    """A class or function that a section names, and the arguments for it. Call the component to construct the object.

    Attributes:
        name: the section's key, for messages.
        path: the dotted path in `_component_`.
        target: the class or function at that path.
        arguments: plain values, or components that are constructed first.
    """

    name: str
    path: str
    target: Callable[..., Any]
    arguments: Mapping[str, Any]

    @classmethod
    def find(cls, name: str, section: object) -> Component:
        """Find the component of a section of plain values; `name` is the section's key.

        Raises:
            ConfigError: if the component does not exist, or if it does not take one of the arguments, or if one is of
                another type than the component's annotations say.
        """
        if not isinstance(section, Mapping) or "_component_" not in section:
            raise ConfigError(f"{name} must be a component, with a dotted path in `_component_`; it is {section!r}")
        path = str(section["_component_"])
        try:
            target = component_at(path)
            taken = inspect.signature(target).parameters
        except Exception as error:  # the path may name a module that fails while it is imported
            raise ConfigError(
                f"{name}._component_ {path!r} cannot be found{_hint(path) or f': {in_one_line(error)}'}"
            ) from error
        given = {str(key): value for key, value in section.items() if key != "_component_"}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        for key in given:
            if key not in taken and not takes_any:
                raise ConfigError(
                    f"{path} takes no argument {name}.{key} ('~{name}.{key}' takes it away){nearest(key, taken)}"
                )
        found = {key: _find_within(f"{name}.{key}", value) for key, value in given.items()}
        hints = annotations_of(target)
        for key in hints.keys() & found.keys() & taken.keys():
            check_argument(f"{name}.{key}", found[key], hints[key], path=path, default=taken[key].default)
        return cls(name, path, target, found)

    def __call__(self, *args: Any, **added: Any) -> Any:
        """Construct the object from the section's arguments and those that the recipe adds.

        Raises:
            ConfigError: if the component refuses its arguments, or gives nothing. The message starts with the section's
                key.
        """
        try:
            made = self.plainly(*args, **added)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{self.name}: {self.path} cannot be constructed: {in_one_line(error)}") from error
        if made is None:
            raise ConfigError(
                f"{self.name}: {self.path} gives nothing; name a class, or a function that returns an object"
            )
        return made

    def plainly(self, *args: Any, **added: Any) -> Any:
        """Construct the object, but do not translate its errors. The caller explains them better."""
        if taken := sorted(set(self.arguments) & set(added)):
            raise ConfigError(f"{self.name}.{taken[0]} is set by the recipe; leave it out of {self.name}")
        return self.target(*args, **_construct(self.arguments), **added)

    @property
    def free_on_resume(self) -> set[str]:
        """The keys of the arguments that may change when a run resumes. The component itself declares them."""
        return {f"{self.name}.{key}" for key in getattr(self.target, "free_on_resume", ())}


def construct(component: Component | None, *args: Any, **added: Any) -> Any:
    """Construct an optional component; None if the config has none."""
    return None if component is None else component(*args, **added)


def in_one_line(error: Exception) -> str:
    """An error as one line. One that no constructor raises on purpose comes with its type and its place."""
    said = " ".join(str(error).split())
    if isinstance(error, (TypeError, ValueError, OSError, ImportError)) and said:
        return said
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {said} ({where.filename}, line {where.lineno})"


def _hint(path: str) -> str:
    """The most similar name in the module of a dotted path, as a hint; empty if there is no such module or name."""
    module, _, name = path.rpartition(".")
    try:
        names = [known for known in vars(importlib.import_module(module)) if known[0] != "_"]
    except Exception:  # it may fail in any way, which the caller tells
        return ""
    if name in names:  # it is there, and something else is wrong with it
        return ""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f" in {module}; did you mean {module}.{close[0]}?" if close else ""


def takes(path: str, argument: str) -> bool:
    """Whether the class or function at a dotted path has an argument of this name; false if it cannot be found."""
    try:
        return argument in inspect.signature(component_at(path)).parameters
    except Exception:  # whatever it is, constructing the component says so
        return False


def find_function(name: str, function: Callable[..., Any] | str) -> Callable[..., Any]:
    """A function, given as itself or by its dotted path; raises ConfigError, with the config key, if there is none."""
    if isinstance(function, str):
        path = function
        try:
            function = component_at(path)
        except Exception as error:  # the path may name a module that fails while it is imported
            why = _hint(path) or f": {in_one_line(error)}"
            raise ConfigError(f"{name} {path!r} cannot be found{why}") from error
    if not callable(function):
        raise ConfigError(f"{name} {function!r} is no function; give the dotted path of one")
    return function


def check_offers(name: str, found: object, protocol: type) -> None:
    """Raise ConfigError if an object that the config key `name` made lacks members of a protocol."""
    members = {*vars(protocol), *vars(protocol).get("__annotations__", {})}
    if missing := sorted(member for member in members if member[0] != "_" and not hasattr(found, member)):
        raise ConfigError(
            f"{name}: {type(found).__name__} lacks {', '.join(missing)}; {protocol.__module__} says what "
            f"{protocol.__name__} has to offer"
        )


def _find_within(name: str, value: Any) -> Any:
    """A value whose inner sections with a `_component_` are turned into components."""
    if not isinstance(value, Mapping):
        return value
    if "_component_" in value:
        return Component.find(name, value)
    return {str(key): _find_within(f"{name}.{key}", inner) for key, inner in value.items()}


def _construct(value: Any) -> Any:
    if isinstance(value, Component):
        return value.plainly()
    if isinstance(value, Mapping):
        return {key: _construct(inner) for key, inner in value.items()}
    return value
