"""Wall time and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class PhaseTimer:
    """Measures the time of phases, in seconds.

    On CUDA, the device notes the time when it comes to a phase's start and to its end. So no phase waits for its
    kernels, and each has the time of its own; only `take` waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phases: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time spent in the scope to `phase`, unless it ends with an error."""
        started = self._now()
        yield
        self._phases.append((phase, started, self._now()))

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by phase."""
        taken, self._phases = self._phases, []
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds: dict[str, float] = {}
        for phase, started, ended in taken:
            between = started.elapsed_time(ended) / 1000 if self._device.type == "cuda" else ended - started
            seconds[phase] = seconds.get(phase, 0.0) + between
        return seconds

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def peak_memory_bytes(device: torch.device) -> int:
    """The peak in bytes: on CUDA the memory of all tensors, on a CPU the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
