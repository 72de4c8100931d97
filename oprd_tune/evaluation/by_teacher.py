"""Held-out accuracy on the prompts of each of several teachers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torchtune.modules import TransformerDecoder

from oprd_tune.evaluation.task_accuracy import TaskAccuracy
from oprd_tune.protocols import Grader
from oprd_tune.types import SamplingRequest


class AccuracyByTeacher:
    """The share of right answers to all held-out prompts, and to those of each teacher.

    Args:
        parts: by teacher, what measures the accuracy on its prompts.

    Attributes:
        last: by teacher, the accuracy that was measured last.
        grader, samples, request: as of a `TaskAccuracy`; the samples of all parts, and the longest request.
    """

    def __init__(self, parts: Mapping[str, TaskAccuracy]) -> None:
        self.parts = dict(parts)
        self.last: dict[str, float] = {}
        self.samples = sum(part.samples for part in parts.values())
        self.grader: Grader = next(iter(parts.values())).grader
        self.request: SamplingRequest = max((part.request for part in parts.values()), key=lambda r: r.longest_row)

    def memory_bytes(self, model: TransformerDecoder, dtype: torch.dtype) -> int:
        """Bytes that the sampling of answers takes beside the model's weights."""
        return max(part.memory_bytes(model, dtype) for part in self.parts.values())

    def __call__(self, model: TransformerDecoder) -> float:
        """The share of right answers, between 0 and 1. Every rank must call."""
        self.last = {name: part(model) for name, part in self.parts.items()}
        return sum(self.last[name] * part.samples for name, part in self.parts.items()) / self.samples

    def of_all(self, accuracies: Mapping[str, float]) -> float | None:
        """The share over all prompts, from the share on each teacher's; None if one is missing."""
        if not accuracies.keys() >= self.parts.keys():
            return None
        return sum(accuracies[name] * part.samples for name, part in self.parts.items()) / self.samples
