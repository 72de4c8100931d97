"""Set up this process of a run: its threads, device, precision and random numbers, and the end of its launcher."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from typing import NoReturn

import torch
from torchtune import training, utils

from oprd_tune.config import EvalSettings, OPRDSettings
from oprd_tune.errors import ConfigError
from oprd_tune.ranks import Ranks, join_ranks

_WATCH_SECONDS = 1.0
_ANSWER_SECONDS = 5.0


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
    if _was_gone_before():  # what has adopted this process since then is no launcher, and may live for ever
        _end("the launcher")

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_WATCH_SECONDS)
        _end(f"the launcher (process {launcher})")

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _was_gone_before() -> bool:
    """Whether no launcher answers where ranks meet. Its imports take a rank some seconds, and it may die meanwhile."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(place, timeout=_ANSWER_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except (OSError, KeyError, ValueError):  # joining the others will tell
        return False
    return False


def _end(gone: str) -> NoReturn:
    print(f"error: {gone} is gone; resume=true goes on", file=sys.stderr, flush=True)
    os._exit(1)
