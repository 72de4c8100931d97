"""Components of a config, the sections with a `_component_`: checked without being constructed, then constructed."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import config
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

from oprd_tune.errors import ConfigError


def check_component(name: str, node: object) -> None:
    """Raise ConfigError unless a section names something that exists, with arguments that it takes."""
    if not isinstance(node, Mapping) or "_component_" not in node:
        raise ConfigError(f"{name} must be a component: give it a `_component_` with a dotted path")
    path = node["_component_"]
    try:
        signature = inspect.signature(_get_component_from_path(str(path)))
    except (InstantiationError, ValueError, TypeError) as error:
        raise ConfigError(f"{name}._component_ {path!r} cannot be found: {error}") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for key, value in node.items():
        if key != "_component_" and key not in signature.parameters and not takes_any:
            raise ConfigError(f"{path} takes no argument {name}.{key}{nearest(key, signature.parameters)}")
        _check_nested(f"{name}.{key}", value)


def _check_nested(name: str, value: object) -> None:
    if isinstance(value, Mapping) and "_component_" in value:
        check_component(name, value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _check_nested(f"{name}.{key}", inner)


def instantiate(cfg: DictConfig, name: str, *args: Any, **kwargs: Any) -> Any:
    """Construct the component at a config's key, and those within it, or return None where there is none.

    Args:
        cfg: the config.
        name: the key.
        args: positional arguments that the recipe adds.
        kwargs: keyword arguments that the recipe adds.

    Raises:
        ConfigError: if the component refuses its arguments; the message starts with the key.
    """
    if cfg.get(name) is None:
        return None
    if taken := sorted(set(cfg[name]) & set(kwargs)):
        raise ConfigError(f"{name}.{taken[0]} is set by the recipe; leave it out of {name}")
    try:
        return config.instantiate(cfg[name], *args, **_nested(cfg[name]), **kwargs)
    except ConfigError:
        raise
    except (TypeError, ValueError, OSError, ImportError) as error:
        raise ConfigError(f"{name}: {cfg[name]['_component_']} cannot be constructed: {error}") from error


def component(cfg: DictConfig, name: str) -> Any:
    """The class or function that a component of a parsed config names."""
    return _get_component_from_path(cfg[name]["_component_"])


def argument(cfg: DictConfig, name: str, key: str) -> Any:
    """What a component will get for an argument: the config's value, or its own default.

    Raises:
        ConfigError: if neither says.
    """
    parameter = inspect.signature(component(cfg, name)).parameters.get(key)
    value = cfg[name].get(key, parameter.default if parameter is not None else inspect.Parameter.empty)
    if value is inspect.Parameter.empty:
        raise ConfigError(f"{cfg[name]['_component_']} has no default for {name}.{key}; give it")
    return value


def _nested(node: DictConfig) -> dict[str, Any]:
    """The arguments of a component that hold components themselves, constructed."""
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): _construct(value) for key, value in plain.items() if _holds_component(value)}


def _construct(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "_component_" in value:
        return config.instantiate(OmegaConf.create(dict(value)), **_nested(OmegaConf.create(dict(value))))
    return {key: _construct(inner) for key, inner in value.items()}


def _holds_component(value: Any) -> bool:
    return isinstance(value, Mapping) and ("_component_" in value or any(map(_holds_component, value.values())))


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the most similar known word, or at all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
