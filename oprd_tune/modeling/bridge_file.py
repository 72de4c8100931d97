"""Read a bridge's file, and check all of it before anything is used. It may come from someone else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.projectors import LayerFit
from oprd_tune.types import LayerPair

FORMAT = "oprd-tune bridge 1"
_FACTS: Mapping[str, type] = {
    "pairs": list,
    "rank": int,
    "plan": dict,
    "student": dict,
    "teacher": dict,
    "conventions": dict,
    "report": dict,
}


def read_bridge(path: Path, *, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts and the tensors of a bridge's file. Facts are those that `Bridge.save` writes.

    Layer pairs come as `LayerPair`, and the report by layer as `LayerFit`.

    Raises:
        ConfigError: if the file is damaged or holds something else; if a fact or a tensor is missing; or if a tensor
            has another shape or dtype than the facts say, values that are not finite, or a variance that is not
            positive.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ConfigError(f"bridge.file: {path} holds no bridge of this version ({FORMAT})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"bridge.file: {path} is damaged or incomplete: {error}") from error
    try:
        facts = _facts(metadata.get("bridge"))
        _check_tensors(facts, tensors)
    except _WrongError as error:
        raise ConfigError(f"bridge.file: {path} is no bridge that can be used: {error}. Fit a new one") from error
    return facts, tensors


class _WrongError(Exception):
    """What is wrong with a file that is a bridge by its name."""


def _facts(text: str | None) -> dict[str, Any]:
    try:
        facts = json.loads(text or "")
    except ValueError as error:
        raise _WrongError("its metadata has no readable entry `bridge`") from error
    for name, kind in _FACTS.items():
        if not isinstance(facts, dict) or not isinstance(facts.get(name), kind) or facts[name] is True:
            raise _WrongError(f"its metadata lacks {name!r}, or it is no {kind.__name__}")
    try:
        facts["pairs"] = [LayerPair(int(student), int(teacher)) for student, teacher in facts["pairs"]]
        facts["report"] = {int(layer): _as_fit(fit) for layer, fit in facts["report"].items()}
        for part in ("student", "teacher"):
            str(facts[part]["name"]), int(facts[part]["width"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _WrongError(f"its metadata is not what this version writes: {type(error).__name__} {error}") from error
    if facts["rank"] < 1 or not facts["pairs"]:
        raise _WrongError(f"it has rank {facts['rank']} and {len(facts['pairs'])} layer pairs; at least 1 of each")
    return facts


def _check_tensors(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    rank, width, teacher_width = facts["rank"], int(facts["student"]["width"]), int(facts["teacher"]["width"])
    shapes: dict[str, Sequence[int]] = {
        "student_RD": (rank, width),
        "student_mean_D": (width,),
        "teacher_RC": (rank, teacher_width),
        "teacher_mean_C": (teacher_width,),
        "variance": (),
    }
    for pair in facts["pairs"]:
        for part, shape in shapes.items():
            name = f"layers.{pair.student}.{part}"
            tensor = tensors.get(name)
            if tensor is None:
                raise _WrongError(f"it lacks {name}")
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != torch.float32:
                found = f"{list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
                raise _WrongError(f"{name} is {found}, not {list(shape)} in float32")
            if not tensor.isfinite().all():
                raise _WrongError(f"{name} has values that are not finite")
        if tensors[f"layers.{pair.student}.variance"] <= 0:
            raise _WrongError(f"layers.{pair.student}.variance is not positive")


def _as_fit(facts: Mapping[str, Any]) -> LayerFit:
    by_rank = {
        name: {int(rank): value for rank, value in facts[name].items()}
        for name in ("cosine_by_rank", "r_squared_by_rank")
    }
    return LayerFit(**{**facts, **by_rank})
