"""Run a recipe in one or several processes, and turn its end into messages and an exit status."""

from __future__ import annotations

import inspect
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Protocol, cast

import torch
from datasets import disable_progress_bars
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from oprd_tune.errors import CheckpointError, ConfigError, NothingLeftToDo, RolloutError
from oprd_tune.failed_ranks import quieten_torchrun, tell
from oprd_tune.ranks import leave_ranks
from oprd_tune.registry import asked_for_one_process, recipe_files
from oprd_tune.run.folder_lock import release_all
from oprd_tune.run.process import end_with_launcher

FAILED = 3  # the exit status of a run that went to its end, and has helped nothing
_USER_ERROR = 2
_RESUME = "resume=true"
_LATER_SECONDS = 8.0
_LOST_PEER = ("Connection reset by peer", "Connection closed by peer")  # gloo's messages


class Recipe(Protocol):
    """The methods that every recipe class has.

    A class may say in `goes_on_by` what continues it after an interruption; `resume=true` if it does not.
    """

    def setup(self) -> None:
        """Check, load and prepare; raise NothingLeftToDo if the user asked for no more than that."""

    def train(self) -> int:
        """Train to the end of the run; returns the exit status."""

    def save(self) -> None:
        """Write a checkpoint of the last finished step."""


def launch(make_recipe: type[Recipe], cfg: DictConfig) -> int:
    """Run a recipe in one process for each GPU of this host; returns the exit status.

    The recipe runs in this process alone if a launcher such as torchrun has started the process, if there is no GPU, if
    the config names a device such as `cpu` or `cuda:0`, or if the user called one of the `…_single_device` names.
    """
    if "RANK" not in os.environ and (processes := _processes_for(_device_in(cfg))) > 1:
        return _launch_ranks(inspect.getfile(make_recipe.setup), processes)
    end_with_launcher()
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - only the first rank prints
        disable_progress_bars()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that a config can name the user's own components
    status = run_recipe(cast(Callable[[DictConfig], Recipe], make_recipe), cfg)
    leave_ranks(together=status in (0, FAILED))
    return status


def run_recipe(make_recipe: Callable[[DictConfig], Recipe], cfg: DictConfig) -> int:
    """Run a recipe in this process; returns its exit status. A user's mistake is printed without a traceback."""
    goes_on_by = getattr(make_recipe, "goes_on_by", _RESUME)
    try:
        return _run(make_recipe, cfg, goes_on_by)
    finally:
        release_all()  # whatever ended the run, this process may live on, as in a notebook


def _run(make_recipe: Callable[[DictConfig], Recipe], cfg: DictConfig, goes_on_by: str) -> int:
    try:
        recipe = make_recipe(cfg)
        recipe.setup()
        return recipe.train()
    except NothingLeftToDo as done:
        print(done)
        return 0
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was saved before is kept, and {goes_on_by} continues from there", file=sys.stderr)
        return 128 + signal.SIGINT
    except RolloutError as error:
        return _save_and_tell(recipe, error, goes_on_by)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not any(reason in str(error) for reason in _LOST_PEER):
            raise
        print(f"error: another rank is gone, and its own message says why; {goes_on_by} goes on", file=sys.stderr)
        return 1
    except (ConfigError, FloatingPointError) as error:
        rank = int(os.environ.get("RANK", 0))
        if rank:  # the first rank mostly prints the same error, and the launcher then ends this process
            time.sleep(_LATER_SECONDS)
        print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr)
        return _USER_ERROR


def _save_and_tell(recipe: Recipe, reason: RolloutError, goes_on_by: str) -> int:
    """Save what was done before a rollout failed. All ranks save, and the first one prints the result."""
    try:
        recipe.save()
        saved = f"What was done until then, if anything, is saved; {goes_on_by} goes on from there"
    except CheckpointError as error:
        saved = f"And then {error}"
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {reason}\n{saved}", file=sys.stderr)
    return 1


def load_recipe(name: str) -> type[Recipe]:
    """The class of one of our recipes. A script may construct it, call `setup`, replace a part, and call `train`."""
    names = runpy.run_path(str(recipe_files()[name]), run_name="recipe")
    (found,) = (v for v in names.values() if isinstance(v, type) and v.__module__ == "recipe")
    return found


def _device_in(cfg: DictConfig) -> str | None:
    try:
        return cfg.get("device")
    except OmegaConfBaseException as error:  # the recipe then says what is wrong with it
        return str(error)


def _processes_for(device: str | None) -> int:
    return torch.cuda.device_count() if device in (None, "cuda") and not asked_for_one_process() else 1


def _launch_ranks(recipe_file: str, processes: int) -> int:
    """Start this command again through torchrun; returns the exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    print(f"Starting {processes} processes, one for each GPU.", flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun does the same, but prints a warning
    quieten_torchrun()
    try:
        run(parse_args(["--standalone", f"--nproc_per_node={processes}", recipe_file, *sys.argv[1:]]))
    except SignalException as received:
        return 128 + received.sigval.value
    except ChildFailedError as failed:
        return tell(failed.failures)
    return 0


class StopSignals:
    """Within the scope, Ctrl-C and SIGTERM ask the loop to stop after its step. A second signal stops at once.

    Attributes:
        received: the number of the first signal, or 0.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> StopSignals:
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for s, handler in self._previous.items():
            signal.signal(s, handler)
        name = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{name}: finishing the step, then saving; once more to stop at once", file=sys.stderr)
