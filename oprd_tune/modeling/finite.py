"""Weights that are not finite are found when they are read, before they look like a learning rate that is too high."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from oprd_tune.errors import ConfigError

_AT_ONCE = 2**24


@torch.no_grad()
def check_finite(weights: Iterable[tuple[str, Tensor]], files: Sequence[Path]) -> None:
    """Raise ConfigError if a weight has NaN or infinity; it names the tensor, and the file that holds it.

    Args:
        weights: names and tensors; those that are not floating-point are passed over.
        files: the files that the weights come from. They are searched only if something is wrong.
    """
    floating = {name: tensor for name, tensor in weights if tensor.is_floating_point() and not tensor.is_meta}
    if not floating:
        return
    finite = torch.stack([_is_finite(tensor).cpu() for tensor in floating.values()]).tolist()
    if broken := [name for name, fine in zip(floating, finite, strict=True) if not fine]:
        where = next((f"{path}: {key}" for path in files for key in _broken_tensors(path)), broken[0])
        raise ConfigError(
            f"{where} has values that are NaN or infinite. The file is damaged, or the model that it holds has "
            "diverged; get another one"
        )


def _is_finite(tensor: Tensor) -> Tensor:
    # Sums of finite weights are too small to overflow. A CPU converts what it sums, so it gets a part at a time.
    parts = tensor.detach().flatten().split(_AT_ONCE)
    return torch.stack([part.sum(dtype=torch.float32) for part in parts]).isfinite().all()


def _broken_tensors(path: Path) -> Iterable[str]:
    if path.suffix != ".safetensors":
        return
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            if tensor.is_floating_point() and not _is_finite(tensor):
                yield key
