"""The folder of a run: Hugging Face exports, and checkpoints that survive a crash in the middle of a save.

    OUTPUT_DIR/config.yaml            the config, overrides included
    OUTPUT_DIR/checkpoints/step_…/    model and optimizer (torch.distributed.checkpoint), and state.pt
    OUTPUT_DIR/best/, final/          Hugging Face folders
    OUTPUT_DIR/metrics.jsonl          the metrics of each logged step
    OUTPUT_DIR/eval_samples.jsonl     answers to the benchmarks of the section `eval`
    OUTPUT_DIR/summary.json, accuracy.png, tensorboard/

A folder is written beside its place and then renamed, so every folder in its place is complete.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import threading
import uuid
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune import training

from oprd_tune.errors import CheckpointError, ConfigError
from oprd_tune.ranks import PATIENCE, Ranks
from oprd_tune.run.export import STAGED, CheckpointerFactory, export_model, quiet, remove_leftovers
from oprd_tune.training.schedules import restore_schedule

# The background thread of a single process prints this warning, so `quiet` cannot catch it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class RunFolder:
    """Saves and finds a run's checkpoints.

    Args:
        output_dir: the run's folder, the same on all ranks.
        keep: the number of checkpoints to keep. Older ones are removed once a new one is complete.
    """

    def __init__(self, output_dir: str, keep: int, ranks: Ranks | None = None) -> None:
        self.path = Path(output_dir)
        self._checkpoints = self.path / "checkpoints"
        self._keep = keep
        self._ranks = ranks or Ranks()
        self._group: dist.ProcessGroup | None = None
        self._saved_step: int | None = None
        self._pending: _PendingCheckpoint | None = None

    def check(self, *, resume: bool) -> Path | None:
        """Check, before anything is loaded, whether the run may start here; returns the checkpoint to resume from.

        Raises:
            ConfigError: if the ranks see different folders, or if `resume` is false and the folder has a checkpoint.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_shared()
        except OSError as error:
            raise ConfigError(f"output_dir {self.path} cannot be used: {error}") from error
        latest = self._ranks.collect(self.latest())[0]
        if latest is not None and not resume:
            raise ConfigError(
                f"output_dir {self.path} holds another run; continue it with resume=true, or give another folder"
            )
        if latest is not None:
            self._saved_step = int(latest.name.removeprefix("step_"))
        elif resume:
            print(f"resume: {self.path} has no checkpoint yet, so the run starts at step 0")
        return latest

    def open(self, record: Mapping[str, Any]) -> None:
        """Write the run's config, as plain values, into the folder. Remove what an interrupted save left there.

        All ranks must have called `check` before.
        """
        self._record = record
        self._ranks.wait()
        if self._ranks.first:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
            remove_leftovers(self._checkpoints)
            write_config(record, self.path)

    def _check_shared(self) -> None:
        """Raise ConfigError unless every rank sees a file that the first rank makes for a moment."""
        mark = self.path / f".seen-by-all-{self._ranks.collect(uuid.uuid4().hex)[0]}"
        if self._ranks.first:
            mark.touch()
        self._ranks.wait()
        if not mark.exists():
            raise ConfigError(
                f"output_dir {self.path} is another folder here than on the first rank's host; give a shared one, as "
                "an absolute path"
            )
        self._ranks.wait()
        if self._ranks.first:
            mark.unlink()

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return max(self._checkpoints.glob("step_*"), default=None)

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, parts: Mapping[str, Any]) -> None:
        """Copy the trained parameters and the optimizer's state to CPU memory, and write them in the background.

        The checkpoint appears in the folder once it is complete. Checkpoints beyond `keep` are then removed.

        Args:
            step: the number of finished optimizer steps.
            model: the student. Frozen parameters are not saved.
            optimizer: the optimizer of the student's trainable parameters.
            parts: further objects with a state, by name. The first rank's state is saved. None is left out.
        """
        if step == self._saved_step or not optimizer.state:  # nothing has been learned yet
            return
        try:
            self.wait()
        except CheckpointError as error:
            print(f"{error}; this one is written all the same", file=sys.stderr)
        self._saved_step = step
        target = self._checkpoints / f"step_{step:08d}"
        staged = target.with_name(STAGED + target.name)
        generators = self._ranks.collect(_rng_state())
        if self._ranks.first:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            write_config(self._record, staged)
            with open(staged / "state.pt", "wb") as file:
                state = {name: part.state_dict() for name, part in parts.items() if part is not None}
                torch.save({"step": step, "rng": generators, "parts": state}, file)
                file.flush()
                os.fsync(file.fileno())
        self._ranks.wait()
        weights, moments = get_state_dict(model, optimizer, options=_TRAINED)
        with quiet():
            # Training communicates while checkpoints are written, so checkpoints need a group of their own. A single
            # process needs one if a library such as vLLM has made a group for GPUs only: `async_save` refuses that one.
            if self._group is None and dist.is_initialized():
                self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
            written = async_save(
                {"model": weights, "optimizer": moments},
                checkpoint_id=staged,
                process_group=self._group,
                no_dist=self._ranks.world_size == 1,
            )
        assert isinstance(written, Future)
        self._pending = _PendingCheckpoint(written, staged, target, self._keep if self._ranks.first else None)

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; raise CheckpointError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def export(
        self, name: str, model: nn.Module, make_checkpointer: CheckpointerFactory, *, dtype: torch.dtype
    ) -> Path:
        """Write the model as a Hugging Face folder, OUTPUT_DIR/`name`, in `dtype`. Every rank must call."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=whole)  # complete on the first rank
        if self._ranks.first:
            export_model(weights, model, make_checkpointer, self.path / name, dtype=dtype)
        self._ranks.wait()
        return self.path / name


class _PendingCheckpoint:
    """A checkpoint that is being written. The first rank renames it once all ranks have written their parts."""

    def __init__(self, written: Future[Any], staged: Path, target: Path, keep: int | None) -> None:
        self._written, self._staged, self._target, self._keep = written, staged, target, keep
        self._lock = threading.Lock()
        if keep is not None:
            written.add_done_callback(lambda done: self._publish() if done.exception() is None else None)

    def wait(self) -> None:
        try:
            self._written.result()
            if self._keep is not None:
                self._publish()
        except (Exception, CheckpointException) as error:  # the library's own exception does not derive from Exception
            raise CheckpointError(f"{self._target} could not be written: {error}") from error

    def _publish(self) -> None:
        with self._lock:
            if self._target.exists():  # the callback or `wait` has published it already
                shutil.rmtree(self._staged, ignore_errors=True)
                return
            os.replace(self._staged, self._target)
            for old in sorted(self._target.parent.glob("step_*"))[: -self._keep]:  # type: ignore[operator]
                doomed = old.with_name(STAGED + old.name)  # a crash then leaves no half-removed checkpoint
                os.replace(old, doomed)
                shutil.rmtree(doomed)


def load_checkpoint(
    checkpoint: Path,
    model: nn.Module,
    optimizer: Optimizer,
    parts: Mapping[str, Any],
    *,
    seed: int,
    ranks: Ranks | None = None,
) -> int:
    """Load a checkpoint; returns the number of finished optimizer steps. Call it when everything is set up.

    Args:
        checkpoint: a folder that `RunFolder.save` wrote, on any number of ranks.
        model: the student, wrapped as it trains.
        optimizer: the optimizer of the student's trainable parameters.
        parts: the same objects as those that were saved.
        seed: seeds the random numbers if the number of ranks has changed, since no saved state fits then. Shuffling and
            sampling do not depend on that state: they follow from the run's seed and the step.
    """
    ranks = ranks or Ranks()
    weights, moments = get_state_dict(model, optimizer, options=_TRAINED)
    saved: dict[str, Any] = {"model": weights, "optimizer": moments}
    with quiet():
        load_tensors(saved, checkpoint_id=checkpoint, no_dist=ranks.world_size == 1)
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=_TRAINED
    )
    state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    for name, part in parts.items():
        if isinstance(part, LRScheduler):
            restore_schedule(part, state["parts"][name])
        elif part is not None:
            part.load_state_dict(state["parts"][name])
    if len(state["rng"]) == ranks.world_size:
        _restore_rng(state["rng"][ranks.rank])
    else:
        training.set_seed(seed)
    print(f"Resuming after step {state['step']}, from {checkpoint}")
    return state["step"]


def _restore_rng(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _rng_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the run that wrote a folder."""
    return OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))


def write_config(record: Mapping[str, Any], folder: Path) -> None:
    """Write a config's plain values as `config.yaml`."""
    OmegaConf.save(OmegaConf.create(dict(record)), folder / "config.yaml")
