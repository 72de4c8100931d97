"""The best engine that works here, for configs that do not want to name one."""

from __future__ import annotations

from typing import NoReturn

import torch

from oprd_tune.errors import ConfigError
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.vllm_colocated import import_vllm

AUTO = "oprd_tune.rollout.auto"
_VLLM, _NATIVE = "oprd_tune.rollout.VLLMColocated", "oprd_tune.rollout.NativeEngine"


def auto(*, temperature: float = 1.0) -> NoReturn:
    """Stands in a config for the engine that `best_engine` names; recipes put that in its place, and save it.

    Args:
        temperature: see `NativeEngine`.
    """
    raise ConfigError(f"{AUTO} is no engine itself; name the one that `best_engine` finds")


def best_engine(device: torch.device, ranks: Ranks) -> tuple[str, str]:
    """The path of vLLM in the trainer's processes if it works on all ranks, else of the student itself; and why."""
    obstacle = None
    try:
        import_vllm(device)
    except ConfigError as error:
        obstacle = str(error)
    obstacles = [found for found in ranks.collect(obstacle) if found is not None]
    return (_NATIVE, obstacles[0]) if obstacles else (_VLLM, "vLLM works here")
