"""This process among those of a run: where it computes, in which precision, with which random numbers."""

from __future__ import annotations

import torch
from torchtune import training, utils

from oprd_tune.config import OPRDSettings
from oprd_tune.errors import ConfigError
from oprd_tune.ranks import Ranks, join_ranks


def join_run(settings: OPRDSettings) -> Ranks:
    """Settle threads, device and seed, and meet the other processes of the run, if there are some.

    Args:
        settings: of the run.

    Raises:
        ConfigError: if this machine has no such device, or the device no such precision.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    ranks = join_ranks(pick_device(settings.device, settings.dtype))
    training.set_seed(settings.seed)
    return ranks


def pick_device(name: str | None, dtype: str) -> torch.device:
    """The device of a run. Nothing is chosen in the user's place once it was named.

    Args:
        name: `cuda`, `cpu`, …; None takes CUDA where there is some, else the CPU.
        dtype: `bf16` or `fp32`; the device has to know it.

    Raises:
        ConfigError: if this machine has no such device, or the device no such precision.
    """
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = utils.get_device(wanted)
        if device.type != torch.device(wanted).type:
            raise RuntimeError(f"torch finds no {wanted} here")
        training.get_dtype(dtype, device=device)
    except RuntimeError as error:
        raise ConfigError(f"device {wanted!r} with dtype {dtype!r} cannot be used: {error}") from error
    return device
