"""The section `eval` of a training run: benchmarks that the student answers while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from oprd_tune.config.checks import check_not_negative, check_whole, typed
from oprd_tune.config.components import Component
from oprd_tune.config.settings import free, free_fields
from oprd_tune.errors import ConfigError, nearest


@dataclass(frozen=True)
class EvalSection:
    """What is measured, how, and how often. docs/configuration.md explains each key, in this order.

    A key that says what is measured must stay when a run resumes, since a curve would otherwise join unlike numbers.

    Attributes:
        benchmarks: by name, called like a data set, with a tokenizer.
        grader: the dotted path of a function (response, answer) → bool, or a component that makes one.
    """

    benchmarks: Mapping[str, Component]
    grader: str | Component
    max_new_tokens: int
    profile: str | None = free(None)  # its values are written out where the config is expanded
    samples_per_problem: int = 4
    temperature: float = 0.7
    first: int | None = None
    every_n_steps: int = free(50)
    problems_per_batch: int = free(8)
    seed: int = 0
    teacher: bool = free(False)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples_per_problem", "every_n_steps", "problems_per_batch"):
            check_whole(f"eval.{name}", getattr(self, name))
        if self.first is not None:
            check_whole("eval.first", self.first)
        check_not_negative("eval.temperature", self.temperature)
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"eval.seed is {self.seed}; it must lie within 0 and 2**32 - 1")
        for name in self.benchmarks:
            if not name.replace("_", "").isalnum():
                raise ConfigError(f"eval.benchmarks has the name {name!r}; allowed are letters, digits and _")

    @classmethod
    def find(cls, name: str, section: object) -> EvalSection:
        """Check a section of plain values, whose key is `name`.

        Raises:
            ConfigError: if a key is unknown or missing, a value has the wrong type or range, or a component does not
                exist.
        """
        if not isinstance(section, Mapping):
            raise ConfigError(f"{name} is {section!r}; give a section with benchmarks, a grader and max_new_tokens")
        known = {f.name: f for f in fields(cls)}
        for key in section:
            if key not in known:
                raise ConfigError(f"{name} has no key {key!r}{nearest(str(key), known)}")
        if missing := [key for key, f in known.items() if f.default is MISSING and section.get(key) is None]:
            raise ConfigError(f"the config lacks {', '.join(f'{name}.{key}' for key in missing)}")
        hints = get_type_hints(cls)
        given: dict[str, Any] = {"benchmarks": named_components(f"{name}.benchmarks", section["benchmarks"])}
        if isinstance(section["grader"], Mapping):
            given["grader"] = Component.find(f"{name}.grader", section["grader"])
        values = {key: typed(f"{name}.{key}", section[key], hints[key]) for key in section if key not in given}
        return cls(**given, **values)

    @property
    def free_on_resume(self) -> set[str]:
        """The keys that may change when a run resumes."""
        return {f"eval.{key}" for key in free_fields(type(self))}


def named_components(name: str, sections: Any) -> dict[str, Component]:
    """The components of several sections, by their names."""
    if not isinstance(sections, Mapping) or not sections:
        raise ConfigError(f"{name} is {sections!r}; give at least one section, each under a name")
    return {str(key): Component.find(f"{name}.{key}", value) for key, value in sections.items()}
