"""Turn a config into a recipe's settings and parts. The config ends here: nothing below takes one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, TypeVar, get_type_hints, overload

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oprd_tune.config.checks import typed
from oprd_tune.config.components import Component
from oprd_tune.config.eval_section import EvalSection, named_components
from oprd_tune.config.settings import FREE_ON_RESUME, free_fields
from oprd_tune.config.several_teachers import COMPONENTS, ONLY_TEACHER, TeacherEntry
from oprd_tune.config.short_form import NAMES, expand, shortened
from oprd_tune.errors import ConfigError, nearest
from oprd_tune.registry import full_name
from oprd_tune.torchtune_compat import recipe_of_running_config

SettingsT = TypeVar("SettingsT")


@dataclass(frozen=True)
class EngineParts:
    """The components of every recipe, by config key.

    Attributes:
        record: the whole config as plain values, with overrides, and with its short form written out. Checkpoints keep
            it.
    """

    record: Mapping[str, Any] = field(metadata={"key": False})
    rollout: Component
    metric_logger: Component = field(metadata=FREE_ON_RESUME)

    def components(self) -> list[Component]:
        """The components that the config has."""
        return [part for f in fields(self) if isinstance(part := getattr(self, f.name), Component)]

    def with_rollout(self: PartsT, path: str) -> PartsT:
        """A copy with another rollout engine that gets the same arguments. The record names the new engine too."""
        section = {**self.record["rollout"], "_component_": path}
        return replace(self, record={**self.record, "rollout": section}, rollout=Component.find("rollout", section))

    def differences(self, saved: Mapping[str, Any], settings: type) -> list[str]:
        """The keys that must not differ from a saved run's record but do, one line each.

        Args:
            saved: the record of the run to resume.
            settings: the dataclass of the recipe's scalars.
        """
        may_differ = free_fields(settings) | free_fields(type(self))
        for component in self.components():
            may_differ |= component.free_on_resume
        may_differ |= {f"teachers.{name}.{key}" for name in self.record.get("teachers") or {} for key in may_differ}
        own = getattr(self, "eval", None)
        may_differ |= {"eval"} if own is None or saved.get("eval") is None else own.free_on_resume
        return _differences(saved, self.record, may_differ)


@dataclass(frozen=True)
class Parts(EngineParts):
    """A training recipe's components, by config key. A component with a default is optional.

    With several `teachers`, `of_each_teacher` has what is a teacher's own; the fields here then hold the first one's.
    For more components in a recipe of your own, derive a frozen dataclass, and give each new field the default None.
    """

    model: Component
    checkpointer: Component
    teacher_model: Component
    teacher_checkpointer: Component
    tokenizer: Component
    dataset: Component
    loss: Component
    optimizer: Component
    lr_scheduler: Component | None = None
    eval_dataset: Component | None = None
    task_accuracy: Component | None = None
    reference_perplexity: Component | None = None
    teacher_tokenizer: Component | None = None
    reader: Component | None = None
    bridge: Component | None = None
    eval: EvalSection | None = field(default=None, metadata={"find": EvalSection.find})
    teachers: Mapping[str, TeacherEntry] | None = field(default=None, metadata={"find": TeacherEntry.find_all})

    def of_each_teacher(self, settings: SettingsT) -> dict[str, tuple[Parts, SettingsT]]:
        """The components and scalars of a config with each of the teachers alone, by its name.

        Raises:
            ConfigError: if one of a teacher's scalars cannot be.
        """
        if not self.teachers:
            return {ONLY_TEACHER: (self, settings)}
        found, hints = {}, get_type_hints(type(settings))
        for name, entry in self.teachers.items():
            own = dict.fromkeys(COMPONENTS) | dict(entry.components)
            try:
                scalars = {key: typed(key, value, hints[key]) for key, value in entry.scalars.items()}
                parts = replace(self, record={**self.record, **entry.record}, teachers=None, **own)  # type: ignore[arg-type]
                found[name] = parts, replace(settings, **scalars)  # type: ignore[type-var]
            except ConfigError as error:
                raise ConfigError(f"teachers.{name}: {error}") from error
        return found


@dataclass(frozen=True)
class EvalParts(EngineParts):
    """The components of `math_eval`. Each benchmark is called like a data set, with a tokenizer."""

    benchmarks: Mapping[str, Component] = field(metadata={"find": named_components})


PartsT = TypeVar("PartsT", bound=EngineParts)


@overload
def resolve(cfg: DictConfig, settings: type[SettingsT], *, recipe: str) -> tuple[SettingsT, Parts]: ...


@overload
def resolve(
    cfg: DictConfig, settings: type[SettingsT], *, recipe: str, parts: type[PartsT]
) -> tuple[SettingsT, PartsT]: ...


def resolve(
    cfg: DictConfig, settings: type[SettingsT], *, recipe: str, parts: type[Any] = Parts
) -> tuple[SettingsT, Any]:
    """Check every key of a config; returns its scalars, and its components ready to be constructed.

    Args:
        cfg: the merged config.
        settings: the dataclass of the recipe's scalars.
        recipe: the recipe's name. The config's `recipe` key must give this name or another name of the same recipe.
        parts: the dataclass of the recipe's components.

    Raises:
        ConfigError: if the config belongs to another recipe; if it has an unknown key, also inside a component; if a
            key is missing; or if a value has the wrong type.
    """
    try:
        given: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the config cannot be resolved: {' '.join(str(error).split())}") from error
    _check_recipe(given, recipe)
    values = expand(given)
    scalar_fields = {f.name: f for f in fields(settings)}  # type: ignore[arg-type]
    part_fields = {f.name: f for f in fields(parts) if f.metadata.get("key", True)}
    known = {*scalar_fields, *part_fields, *NAMES, "recipe"}
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown config key {key!r}{nearest(key, known)}")
    first: Mapping[str, Any] = next(iter((values.get("teachers") or {}).values()), {})
    of_components = values | {key: first[key] for key in COMPONENTS if key in first}
    required = [name for name, f in (scalar_fields | part_fields).items() if f.default is MISSING]
    if missing := [name for name in required if of_components.get(name) is None]:
        raise ConfigError(f"the config lacks {', '.join(shortened(missing))}")
    found: dict[str, Any] = {
        name: f.metadata.get("find", Component.find)(name, of_components[name])
        for name, f in part_fields.items()
        if of_components.get(name) is not None
    }
    hints = get_type_hints(settings)
    scalars = {name: typed(name, values[name], hints[name]) for name in scalar_fields if name in values}
    return settings(**scalars), parts(record={**values, "recipe": recipe}, **found)


def _check_recipe(given: Mapping[str, Any], recipe: str) -> None:
    named = given.get("recipe") or recipe_of_running_config()
    if not isinstance(named, str | None):
        raise ConfigError(f"recipe is {named!r}; give the name of a recipe, such as {recipe}")
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
