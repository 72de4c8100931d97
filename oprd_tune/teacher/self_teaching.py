"""Teachers that are the student: a copy of its first weights, their moving average, or its present weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from oprd_tune.config import OPRDSettings, Parts
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.adapters import plain_name


class MovingAverage:
    """The weights of a teacher that follows its student: θ_T ← d · θ_T + (1 − d) · θ_S after each optimizer step.

    The average is kept in fp32, in the student's own shards, because a step of (1 − d) would vanish in bf16.

    Args:
        student: the student, before its first step. Only what trains is averaged.
        teacher: a model with the student's first weights and the student's names, replicated or sharded. What it has
            lost by now does not follow, so it must still have a head that a loss reads.
        decay: d, within 0 and 1. 1 would be a frozen copy.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, decay: float) -> None:
        self._decay, self._teacher = decay, teacher
        theirs = dict(teacher.named_parameters())
        self._trained = {plain_name(name): p for name, p in student.named_parameters() if p.requires_grad}
        self._trained = {name: p for name, p in self._trained.items() if name in theirs}
        self._targets = {name: theirs[name] for name in self._trained}
        self.tensors = {name: p.detach().float().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the student's present weights. Every rank calls."""
        for name, average in self.tensors.items():
            average.lerp_(self._trained[name].detach().float(), 1 - self._decay)
        self.hand_over()

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give the teacher the average. Every rank calls."""
        for name, average in self.tensors.items():
            _assign(self._targets[name], average)
        for module in self._teacher.modules():
            if isinstance(module, FSDPModule):  # some stay gathered after a forward pass, with the weights of that pass
                module.reshard()


def _assign(target: Tensor, value: Tensor) -> None:
    """Copy a value that may be sharded into a parameter that may be sharded in the same way, or is whole."""
    if isinstance(target, DTensor):
        target, value = target.to_local(), value.to_local() if isinstance(value, DTensor) else value
    moved = value.to(target.device)
    target.copy_(moved.full_tensor() if isinstance(moved, DTensor) else moved)


def check_teacher_weights(parts: Parts, settings: OPRDSettings, *, adapted: bool) -> None:
    """Raise ConfigError if a teacher that changes with its student is not that student, or cannot change.

    `adapted` says whether the student has adapters.
    """
    s, record = settings, parts.record
    if not s.teacher_is_student and s.teacher_decay is None:
        return
    kind = "live" if s.teacher_is_student else "ema"
    said = f"teacher_weights is {kind}"
    if not is_student(record):
        raise ConfigError(f"{said}, which is for a student that teaches itself: give `teacher: student`")
    if parts.bridge is not None:
        raise ConfigError(f"{said}, but a bridge is fitted to a teacher that stays as it is; leave one of the two out")
    if s.teacher_quantization is not None:
        raise ConfigError(f"{said}, but a quantised teacher cannot change; leave teacher_quantization out")
    if kind == "live" and s.teacher_placement != "replicated":
        raise ConfigError(f"{said}, so the teacher is where the student is; leave teacher_placement out")
    if s.teacher_placement == "offloaded":
        raise ConfigError(f"{said}, but an offloaded teacher cannot change; give replicated or sharded")
    if kind == "ema" and adapted:
        raise ConfigError(f"{said}, which averages whole weights, but only adapters train; give initial or live")


def tell_of_live_states(settings: OPRDSettings, *, compares_heads: bool) -> None:
    """Warn of a teacher that moves with its student where nothing but hidden states is compared."""
    if settings.teacher_is_student and not compares_heads:
        print(
            "teacher_weights is live, and only hidden states are compared: both sides move, and may come to agree on "
            "states that say nothing; give initial, or a slow average such as `ema: 0.99`"
        )


def is_student(record: Mapping[str, Any]) -> bool:
    """Whether the teacher of a config is its student, as it is at the start."""
    return _plain_sections(record, "") == _plain_sections(record, "teacher_")


def _plain_sections(record: Mapping[str, Any], prefix: str) -> list[dict[str, Any]]:
    """What a record says about a model and its files, without adapters."""
    sections = [dict(record[f"{prefix}{name}"]) for name in ("model", "checkpointer")]
    return [{key: value for key, value in section.items() if key != "lora"} for section in sections]
