"""Chooses an engine for configs that do not name one."""

from __future__ import annotations

from typing import NoReturn

import torch

from oprd_tune.config.parts import PartsT
from oprd_tune.errors import ConfigError
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.vllm.colocated import import_vllm

AUTO = "oprd_tune.rollout.auto"
_VLLM, _NATIVE = "oprd_tune.rollout.VLLMColocated", "oprd_tune.rollout.NativeEngine"


def auto(*, temperature: float = 1.0) -> NoReturn:
    """A placeholder in configs, which recipes replace by the engine that `choose_engine` picks."""
    raise ConfigError(f"{AUTO} is no engine itself; recipes put one in its place, see `choose_engine`")


def choose_engine(parts: PartsT, saved: str | None, device: torch.device, ranks: Ranks) -> PartsT:
    """Replace `auto` by a real engine, and print which and why. All ranks must call. Any other engine is kept.

    A run that resumes keeps the engine `saved` in its checkpoint; for a new run, `saved` is None.

    Raises:
        ConfigError: if a checkpoint names an engine that `auto` never chooses: it may come from someone else.
    """
    if parts.rollout.path != AUTO:
        return parts
    if saved not in (None, _VLLM, _NATIVE):
        raise ConfigError(
            f"resume: the checkpoint's config.yaml names the engine {saved!r}, which {AUTO} never chooses; if you "
            "trust it, name it yourself in rollout._component_"
        )
    chosen, why = best_engine(device, ranks) if saved is None else (saved, "as before")
    print(f"rollout: {chosen.rpartition('.')[2]}, {why}")
    return parts.with_rollout(chosen)


def best_engine(device: torch.device, ranks: Ranks) -> tuple[str, str]:
    """The dotted path of an engine, and why: `VLLMColocated` if vLLM works on all ranks, otherwise `NativeEngine`."""
    obstacle = None
    try:
        import_vllm(device)
    except ConfigError as error:
        obstacle = str(error)
    obstacles = [found for found in ranks.collect(obstacle) if found is not None]
    if obstacles:
        return _NATIVE, f"since {obstacles[0].removeprefix('rollout: ')}"
    return _VLLM, "since vLLM works here"
