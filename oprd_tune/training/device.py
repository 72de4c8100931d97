"""Where a run computes, and in which precision. Nothing is chosen in the user's place once it was named."""

from __future__ import annotations

import torch
from torchtune import training, utils

from oprd_tune.errors import ConfigError


def pick_device(name: str | None, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and the data type of a run.

    Args:
        name: `cuda`, `cpu`, …; None takes CUDA where there is some, else the CPU.
        dtype: `bf16` or `fp32`.

    Raises:
        ConfigError: if this machine has no such device, or the device no such type.
    """
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = utils.get_device(wanted)
        if device.type != torch.device(wanted).type:
            raise RuntimeError(f"torch finds no {wanted} here")
        return device, training.get_dtype(dtype, device=device)
    except RuntimeError as error:
        raise ConfigError(f"device {wanted!r} with dtype {dtype!r} cannot be used: {error}") from error
