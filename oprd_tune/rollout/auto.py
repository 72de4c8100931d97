"""The best engine that works here, for configs that do not want to name one."""

from __future__ import annotations

from typing import NoReturn

import torch

from oprd_tune.config.parts import Parts
from oprd_tune.errors import ConfigError
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.vllm.colocated import import_vllm

AUTO = "oprd_tune.rollout.auto"
_VLLM, _NATIVE = "oprd_tune.rollout.VLLMColocated", "oprd_tune.rollout.NativeEngine"


def auto(*, temperature: float = 1.0) -> NoReturn:
    """Stands in a config for the engine that `choose_engine` names.

    Args:
        temperature: see `NativeEngine`.
    """
    raise ConfigError(f"{AUTO} is no engine itself; recipes put one in its place, see `choose_engine`")


def choose_engine(parts: Parts, saved: str | None, device: torch.device, ranks: Ranks) -> Parts:
    """Put a real engine in the place of `auto`, and say which. Every rank must call.

    Args:
        parts: of the run; another engine than `auto` stays.
        saved: the engine of the checkpoint that the run resumes from; it stays too.
        device: where the run computes.
        ranks: the processes of the run.
    """
    if parts.rollout.path != AUTO:
        return parts
    chosen, why = best_engine(device, ranks) if saved is None else (saved, "as before")
    print(f"rollout: {chosen.rpartition('.')[2]} ({why})")
    return parts.with_rollout(chosen)


def best_engine(device: torch.device, ranks: Ranks) -> tuple[str, str]:
    """The path of vLLM in the trainer's processes if it works on all ranks, else of the student itself; and why."""
    obstacle = None
    try:
        import_vllm(device)
    except ConfigError as error:
        obstacle = str(error)
    obstacles = [found for found in ranks.collect(obstacle) if found is not None]
    return (_NATIVE, obstacles[0]) if obstacles else (_VLLM, "vLLM works here")
