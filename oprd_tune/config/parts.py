"""From a config to a recipe's settings and parts. This is where the config ends: nothing else ever sees it."""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oprd_tune.config.components import Component, nearest
from oprd_tune.config.settings import FREE_ON_RESUME, free_fields
from oprd_tune.errors import ConfigError
from oprd_tune.registry import full_name
from oprd_tune.torchtune_compat import recipe_of_running_config


@dataclass(frozen=True)
class Parts:
    """A recipe's components by config key; one with a default is optional.

    A recipe of your own may take more: derive a frozen dataclass, and give each new field the default None.

    Attributes:
        record: the whole config as plain values, for a checkpoint; overrides included.
    """

    record: Mapping[str, Any] = field(metadata={"key": False})
    model: Component
    checkpointer: Component
    teacher_model: Component
    teacher_checkpointer: Component
    tokenizer: Component
    dataset: Component
    loss: Component
    optimizer: Component
    rollout: Component
    metric_logger: Component = field(metadata=FREE_ON_RESUME)
    lr_scheduler: Component | None = None
    eval_dataset: Component | None = None
    task_accuracy: Component | None = None
    reference_perplexity: Component | None = None
    teacher_tokenizer: Component | None = None
    reader: Component | None = None
    bridge: Component | None = None

    def components(self) -> list[Component]:
        """Those that the config has."""
        return [part for f in fields(self) if isinstance(part := getattr(self, f.name), Component)]

    def with_rollout(self, path: str) -> Parts:
        """The same with another engine under the same arguments; the record says so."""
        section = {**self.record["rollout"], "_component_": path}
        return replace(self, record={**self.record, "rollout": section}, rollout=Component.find("rollout", section))

    def differences(self, saved: Mapping[str, Any], settings: type) -> list[str]:
        """What differs from the record of a run that is to be resumed, and may not; one line a key.

        Args:
            saved: that record.
            settings: the dataclass of the recipe's scalars.
        """
        may_differ = free_fields(settings) | free_fields(type(self))
        for component in self.components():
            may_differ |= component.free_on_resume
        return _differences(saved, self.record, may_differ)


SettingsT = TypeVar("SettingsT")


def resolve(
    cfg: DictConfig, settings: type[SettingsT], *, recipe: str, parts: type[Parts] = Parts
) -> tuple[SettingsT, Parts]:
    """Check every key of a config; returns its scalars, and its components ready to be constructed.

    Args:
        cfg: the merged config.
        settings: the dataclass of the recipe's scalars.
        recipe: the recipe's name; the config's `recipe` key must say the same, or a further name of that recipe.
        parts: the dataclass of its components.

    Raises:
        ConfigError: for a config of another recipe; an unknown key, here or inside a component, with the nearest valid
            one; a missing key; or a value of another type.
    """
    _check_recipe(cfg, recipe)
    try:
        values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the config cannot be resolved: {error}") from error
    scalar_fields = {f.name: f for f in fields(settings)}  # type: ignore[arg-type]
    part_fields = {f.name: f for f in fields(parts) if f.metadata.get("key", True)}
    for name in part_fields:  # torchtune reads `task_accuracy=null` as `task_accuracy._component_=null`
        if isinstance(section := values.get(name), Mapping) and section.get("_component_", "") is None:
            values[name] = None
    known = {*scalar_fields, *part_fields, "recipe"}
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown config key {key!r}{nearest(key, known)}")
    required = [name for name, f in (scalar_fields | part_fields).items() if f.default is MISSING]
    if missing := [name for name in required if values.get(name) is None]:
        raise ConfigError(f"the config lacks {', '.join(missing)}")
    found = {name: Component.find(name, values[name]) for name in part_fields if values.get(name) is not None}
    hints = get_type_hints(settings)
    scalars = {name: _typed(name, values[name], hints[name]) for name in scalar_fields if name in values}
    return settings(**scalars), parts(record=values, **found)


def _check_recipe(cfg: DictConfig, recipe: str) -> None:
    named = cfg.get("recipe") or recipe_of_running_config()
    if named is None:
        raise ConfigError(f"this config has no `recipe` key; write `recipe: {recipe}` if it was made for that recipe")
    if full_name(named) != recipe:
        raise ConfigError(f"this config belongs to {named}, not to {recipe}: tune run {named} --config …")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if prefix + key in free or before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _differences(before, after, free, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}: {before!r} then, {after!r} now")
    return found


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type; only whole numbers turn into floats, nothing else is converted."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if get_origin(option) is list and isinstance(value, list):
            return [_typed(name, item, get_args(option)[0]) for item in value]
        if isinstance(option, type) and isinstance(value, option) and (option is bool) == isinstance(value, bool):
            return value
    wanted = " or ".join("null" if o is type(None) else o.__name__ if isinstance(o, type) else str(o) for o in options)
    raise ConfigError(f"{name} is {value!r}; it must be {wanted}")
