"""Profiles: values for the keys of an evaluation that its config leaves out, under one name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oprd_tune.config.components import takes
from oprd_tune.errors import ConfigError


@dataclass(frozen=True)
class Profile:
    """How a benchmark is asked: `instruction` as in `prompt_dataset`; None leaves a data set's own."""

    temperature: float
    samples_per_problem: int
    instruction: str | None = None


PROFILES = {
    "paper": Profile(temperature=0.7, samples_per_problem=16, instruction="boxed"),  # Avg@16, as papers report it
    "greedy": Profile(temperature=0.0, samples_per_problem=1),
}


def with_profile(key: str, section: Mapping[str, Any], *, temperature_in: str | None = None) -> dict[str, Any]:
    """An evaluation's keys, with those that it leaves out filled in by its `profile`, if it names one.

    Args:
        key: the config key of `profile`, for messages.
        section: the keys, with benchmarks by name.
        temperature_in: the section that has the temperature; None for `section` itself.

    Raises:
        ConfigError: if there is no such profile.
    """
    name = section.get("profile")
    if name is None:
        return dict(section)
    if name not in PROFILES:
        raise ConfigError(f"{key} is {name!r}; allowed are {', '.join(PROFILES)}")
    profile = PROFILES[name]
    found = {"samples_per_problem": profile.samples_per_problem, **section}
    if temperature_in is None:
        found = {"temperature": profile.temperature, **found}
    else:
        found[temperature_in] = {"temperature": profile.temperature, **(found.get(temperature_in) or {})}
    if profile.instruction is not None and isinstance(found.get("benchmarks"), Mapping):
        own = found["benchmarks"].items()
        found["benchmarks"] = {each: _instructed(data, profile.instruction) for each, data in own}
    return found


def _instructed(section: Any, instruction: str) -> Any:
    """A data set's section that ends prompts with an instruction, if it has none and can take one.

    A data set by name has its own, or a file whose prompts hold one.
    """
    takes_one = isinstance(section, Mapping) and takes(str(section.get("_component_")), "instruction")
    if not takes_one or section.get("benchmark") is not None or section.get("instruction") is not None:
        return section
    return {**section, "instruction": instruction}
