"""Counts what code launches on a device, and how often it waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
WAITS_ON_CPU = ("aten::_local_scalar_dense", "aten::nonzero")  # operators for whose results a GPU is waited for
NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::empty_like")
NO_LAUNCH += ("aten::_unsafe_view", "aten::detach", "aten::promote_types")


def count_calls(action: Callable[[], object]) -> tuple[int, int]:
    """How often an action launches something on the device, and how often it waits for the device.

    On CUDA these are launches of kernels, graphs and copies, as the profiler sees them. On a CPU they are operators
    that compute something, for which a GPU would launch a kernel or more.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile
    from torch.utils._python_dispatch import TorchDispatchMode

    if torch.cuda.is_available():
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            action()
        names = [event.name for event in profiled.events()]
        return sum(name.startswith(LAUNCHES) for name in names), sum(name in WAITS for name in names)
    found: list[str] = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not func.is_view:
                found.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Operators():
        action()
    return sum(name not in NO_LAUNCH for name in found), sum(name in WAITS_ON_CPU for name in found)
