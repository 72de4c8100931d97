"""How decoding goes on a device: how often it waits for results, and whether a step is one launch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Step = Callable[[], None]
_NO_GRAPHS = "OPRD_TUNE_NO_CUDA_GRAPHS"


def as_it_is(step: Step) -> Step:
    """The step itself."""
    return step


@dataclass(frozen=True)
class Pace:
    """What suits a device in decoding. It changes when things are computed, but not what is sampled.

    Attributes:
        check_every: tokens from one look at which rows have ended to the next. A look waits for the device.
        rows_leave_at: rows that have ended leave once at most this share of the rows goes on.
        steady: whether a step keeps its tensors, and their shapes, for many tokens.
        repeatable: makes a steady step one that is called again and again.
    """

    check_every: int = 1
    rows_leave_at: float = 1.0
    steady: bool = False
    repeatable: Callable[[Step], Step] = as_it_is


IMMEDIATE = Pace()  # a CPU has its results at once, and is quickest without a row too many


def pace_for(model: nn.Module, device: torch.device) -> Pace:
    """The pace of a device. Steps of a model whose weights are plain tensors on CUDA are captured as CUDA graphs.

    A model that is quantised or offloaded decodes without; so does any with OPRD_TUNE_NO_CUDA_GRAPHS=1.
    """
    if device.type != "cuda":
        return IMMEDIATE
    plain = all(type(p.data) is torch.Tensor and p.dtype.is_floating_point for p in model.parameters())
    plain = plain and all(p.device == device for p in model.parameters())
    with_graphs = plain and os.environ.get(_NO_GRAPHS, "0") in ("", "0")
    return Pace(check_every=16, rows_leave_at=0.5, steady=True, repeatable=CapturedStep if with_graphs else as_it_is)


class CapturedStep:
    """A steady step as a CUDA graph. The first call runs it and the second captures it; from then on, one launch each.

    Raises:
        RuntimeError: if the step does something that no graph can hold, such as waiting for the device.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._stream = torch.cuda.Stream()
        self._is_warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self._is_warm:  # libraries set themselves up, which must not be captured
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._step()
            torch.cuda.current_stream().wait_stream(self._stream)
            self._is_warm = True
            return
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as the one that writes a checkpoint, may use CUDA meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._step()
        except RuntimeError as error:
            raise RuntimeError(
                f"a decoding step cannot be captured as a CUDA graph ({error}); {_NO_GRAPHS}=1 decodes without graphs"
            ) from error
        return graph
