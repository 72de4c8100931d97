"""From `tune run` to a recipe and back to the shell: processes, messages, exit codes, signals."""

from __future__ import annotations

import inspect
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Protocol, cast

import torch
import torch.distributed as dist
from datasets import disable_progress_bars
from omegaconf import DictConfig

from oprd_tune.errors import CheckpointError, ConfigError, NothingLeftToDo, RolloutError
from oprd_tune.registry import asked_for_one_process, recipe_files

_USER_ERROR = 2
_LATER_SECONDS = 3.0
_LOST_PEER = ("Connection reset by peer", "Connection closed by peer")  # gloo's words


class Recipe(Protocol):
    """What every recipe class offers."""

    def setup(self) -> None:
        """Check, load, prepare.

        Raises:
            NothingLeftToDo: if the run ends here as asked for.
        """

    def train(self) -> int:
        """Run to the end; returns the exit status."""

    def save(self) -> None:
        """Write a checkpoint of the last finished step."""


def launch(make_recipe: type[Recipe], cfg: DictConfig) -> int:
    """Run a recipe in this process if a launcher has started it, else in one process for each GPU of this host.

    It is one process, this one, without a GPU, for a named device such as `cpu` or `cuda:0`, and where the recipe was
    called by one of its `…_single_device` names.

    Returns:
        The exit status.
    """
    if "RANK" not in os.environ and (processes := _processes_for(cfg.get("device"))) > 1:
        return _launch_ranks(inspect.getfile(make_recipe.setup), processes)
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first rank speaks for all
        disable_progress_bars()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for components of the user's own
    status = run_recipe(cast(Callable[[DictConfig], Recipe], make_recipe), cfg)
    if status == 0 and dist.is_initialized():
        dist.destroy_process_group()
    return status


def run_recipe(make_recipe: Callable[[DictConfig], Recipe], cfg: DictConfig) -> int:
    """Run a recipe in this process; returns its exit status.

    What the user got wrong is printed as one message, without a traceback.
    """
    try:
        recipe = make_recipe(cfg)
        recipe.setup()
        return recipe.train()
    except NothingLeftToDo as done:
        print(done)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; what was saved before is kept, and resume=true continues from there", file=sys.stderr)
        return 128 + signal.SIGINT
    except RolloutError as error:
        return _save_and_tell(recipe, error)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not any(reason in str(error) for reason in _LOST_PEER):
            raise
        print("error: another rank is gone, and its own message says why; resume=true goes on", file=sys.stderr)
        return 1
    except (ConfigError, FloatingPointError) as error:
        rank = int(os.environ.get("RANK", 0))
        if rank:  # most often the first rank says the same, and the launcher then ends this one
            time.sleep(_LATER_SECONDS)
        print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr)
        return _USER_ERROR


def _save_and_tell(recipe: Recipe, reason: RolloutError) -> int:
    """Save what was learned before a rollout failed, on all ranks, and say both once."""
    try:
        recipe.save()
        saved = "What was learned until then, if anything, is saved; resume=true goes on from there"
    except CheckpointError as error:
        saved = f"And then {error}"
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {reason}\n{saved}", file=sys.stderr)
    return 1


def load_recipe(name: str) -> type[Recipe]:
    """The class of one of our recipes: construct it, call `setup`, exchange a part such as `teacher`, then `train`."""
    names = runpy.run_path(str(recipe_files()[name]), run_name="recipe")
    (found,) = (v for v in names.values() if isinstance(v, type) and v.__module__ == "recipe")
    return found


def _processes_for(device: str | None) -> int:
    return torch.cuda.device_count() if device in (None, "cuda") and not asked_for_one_process() else 1


def _launch_ranks(recipe_file: str, processes: int) -> int:
    """Start this command again through torchrun; returns the exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    print(f"Starting {processes} processes, one for each GPU.", flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with a warning
    try:
        run(parse_args(["--standalone", f"--nproc_per_node={processes}", recipe_file, *sys.argv[1:]]))
    except SignalException as received:
        return 128 + received.sigval.value
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(
                f"error: rank {rank} (process {failure.pid}) was ended by {name}, so all others were stopped; "
                "resume=true continues from the last checkpoint",
                file=sys.stderr,
            )
            return 128 - failure.exitcode
        return failure.exitcode
    return 0


class StopSignals:
    """Within the scope, Ctrl-C and SIGTERM ask the loop to stop after its step; a second one stops at once.

    Attributes:
        received: the signal's number, or 0.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> StopSignals:
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for s, handler in self._previous.items():
            signal.signal(s, handler)
        name = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{name}: finishing the step, then saving; once more to stop at once", file=sys.stderr)

    @property
    def exit_status(self) -> int:
        """What the shell expects: 0, or 128 and the signal's number."""
        return 128 + self.received if self.received else 0
