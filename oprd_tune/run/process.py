"""Set up this process of a run: its threads, device, precision and random numbers, and the end of its launcher."""

from __future__ import annotations

import os
import sys
import threading
import time

import torch
from torchtune import training, utils

from oprd_tune.config import EvalSettings, OPRDSettings
from oprd_tune.errors import ConfigError
from oprd_tune.ranks import Ranks, join_ranks

_WATCH_SECONDS = 1.0


def join_run(settings: OPRDSettings | EvalSettings) -> Ranks:
    """Set threads, device and seed, and meet the other processes of the run.

    A device that the user names is never replaced by another. Without a name, the run takes CUDA if there is some, else
    the CPU.

    Raises:
        ConfigError: if this machine has no such device, or if the device does not support the dtype.
    """
    s = settings
    if s.num_threads is not None:
        torch.set_num_threads(s.num_threads)
    wanted = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = utils.get_device(wanted)
        if device.type != torch.device(wanted).type:
            raise RuntimeError(f"torch finds no {wanted} here")
        training.get_dtype(s.dtype, device=device)
        torch.ones((), device=device).item()  # such as `meta` holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {wanted!r} with dtype {s.dtype!r} cannot be used: {reason}") from error
    ranks = join_ranks(device)
    training.set_seed(s.seed)
    return ranks


def end_with_launcher() -> None:
    """End this process within seconds if torchrun, which has started it, is gone. Else ranks would train on unseen.

    What was saved before stays. Processes that nothing has started, or another launcher, are left alone.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_WATCH_SECONDS)
        print(f"error: the launcher (process {launcher}) is gone; resume=true goes on", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
