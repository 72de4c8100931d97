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


class Components:
    """The components of a parsed config: `make("loss")` constructs the one at the key `loss`, and those within it.

    Args:
        cfg: the config.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Construct a component, or return None where there is none.

        Args:
            name: its key.
            args: positional arguments that the recipe adds.
            kwargs: keyword arguments that the recipe adds.

        Raises:
            ConfigError: if the component refuses its arguments; the message starts with the key.
        """
        node = self._cfg.get(name)
        if node is None:
            return None
        if taken := sorted(set(node) & set(kwargs)):
            raise ConfigError(f"{name}.{taken[0]} is set by the recipe; leave it out of {name}")
        try:
            return config.instantiate(node, *args, **_nested(node), **kwargs)
        except ConfigError:
            raise
        except (TypeError, ValueError, OSError, ImportError) as error:
            raise ConfigError(f"{name}: {node['_component_']} cannot be constructed: {error}") from error

    def __contains__(self, name: str) -> bool:
        """Whether the config has a component at a key."""
        return self._cfg.get(name) is not None

    def type_of(self, name: str) -> Any:
        """The class or function that a component names."""
        return _get_component_from_path(self._cfg[name]["_component_"])

    def plainly(self, name: str, **kwargs: Any) -> Any:
        """Construct a component whose errors somebody else explains."""
        return config.instantiate(self._cfg[name], **kwargs)

    def argument(self, name: str, key: str, otherwise: Any = inspect.Parameter.empty) -> Any:
        """What a component will get for an argument: the config's value, or its own default, or `otherwise`.

        Raises:
            ConfigError: if none of them says.
        """
        node, parameter = self._cfg[name], inspect.signature(self.type_of(name)).parameters.get(key)
        value = node.get(key, parameter.default if parameter is not None else otherwise)
        if value is inspect.Parameter.empty:
            raise ConfigError(f"{node['_component_']} has no default for {name}.{key}; give it")
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
