"""The folder of a run: Hugging Face exports, and checkpoints that survive a crash in the middle of a save.

    OUTPUT_DIR/config.yaml            the config, overrides included
    OUTPUT_DIR/checkpoints/step_…/    model and optimizer (torch.distributed.checkpoint), state.pt and manifest.json
    OUTPUT_DIR/best/, final/          Hugging Face folders
    OUTPUT_DIR/metrics.jsonl          the metrics of each logged step
    OUTPUT_DIR/eval_samples.jsonl     answers to the benchmarks of the section `eval`
    OUTPUT_DIR/run.lock               names the process that runs here
    OUTPUT_DIR/summary.json, accuracy.png, tensorboard/

A folder is written beside its place and then renamed, so every folder in its place is complete.
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer

from oprd_tune.errors import CheckpointError, ConfigError, DamagedCheckpoint
from oprd_tune.modeling.safe_reading import STATE, why
from oprd_tune.ranks import PATIENCE, Ranks
from oprd_tune.run.export import STAGED, CheckpointerFactory, export_model, quiet, remove_leftovers
from oprd_tune.run.folder_lock import FolderLock
from oprd_tune.run.manifest import check_whole
from oprd_tune.run.publishing import ADVICE, PendingCheckpoint, checkpoints_in, set_aside, step_of
from oprd_tune.run.records import write_config
from oprd_tune.run.restore import TRAINED, rng_state
from oprd_tune.teacher.self_teaching import MovingAverage

# The background thread of a single process prints this warning, so `quiet` cannot catch it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


_RESULTS = ("final", "summary.json")  # what a finished run leaves, and the next one in its folder would overwrite


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
        self._damaged: list[Path] = []
        self._lock = FolderLock(self.path)
        self._pending: PendingCheckpoint | None = None

    def check(self, *, resume: bool) -> Path | None:
        """Check, before anything is loaded, whether the run may start here; returns the checkpoint to resume from.

        That is the newest whole one. Damaged ones are named.

        Raises:
            ConfigError: if the ranks see different folders; if another process runs here; if the folder has the results
                of a run that this one does not resume; or if all checkpoints are damaged.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_shared()
        except OSError as error:
            raise ConfigError(f"output_dir {self.path} cannot be used: {error}") from error
        found, refused = self._ranks.collect(self._may_start(resume=resume))[0]
        if refused:
            raise ConfigError(refused)
        if found is not None:
            self._saved_step = step_of(found)
        elif resume:
            print(f"resume: {self.path} has no checkpoint yet, so the run starts at step 0")
        return found

    def _may_start(self, *, resume: bool) -> tuple[Path | None, str | None]:
        """The checkpoint to resume from, and why the run may not start, as the first rank finds them."""
        if not self._ranks.first:
            return None, None
        try:
            if refused := self._lock.refusal():
                return None, refused
            return self._own_checkpoint(resume=resume), None
        except OSError as error:
            return None, f"output_dir {self.path} cannot be used: {error}"
        except ConfigError as error:
            return None, str(error)

    def _own_checkpoint(self, *, resume: bool) -> Path | None:
        """The checkpoint to resume from; raises ConfigError if what lies here belongs to another run."""
        if self.latest() is None:
            for name in _RESULTS:
                if (self.path / name).exists() and not (self.path / name).is_symlink():
                    raise ConfigError(
                        f"output_dir {self.path} holds another run: there is {name}, and no checkpoint with which "
                        "resume=true could continue it; give another folder"
                    )
        elif not resume:
            raise ConfigError(
                f"output_dir {self.path} holds another run; continue it with resume=true, or give another folder"
            )
        return self._newest_whole() if resume else None

    def _newest_whole(self) -> Path | None:
        """The newest checkpoint that is as it was written; None if there are none at all."""
        damages: dict[Path, str] = {}
        for checkpoint in reversed(checkpoints_in(self._checkpoints)):
            try:
                check_whole(checkpoint)
            except DamagedCheckpoint as damage:
                damages[checkpoint] = str(damage)
                continue
            for told in damages.values():
                print(f"resume: {told}; it is set aside, and the run goes on from {checkpoint.name}", file=sys.stderr)
            self._damaged = list(damages)
            return checkpoint
        if damages:
            raise ConfigError(
                f"resume: no checkpoint in {self._checkpoints} is whole: {'; '.join(damages.values())}. Bring one "
                "back from a copy, or start again in another output_dir"
            )
        return None

    def open(self, record: Mapping[str, Any]) -> None:
        """Write the run's config, as plain values, into the folder. Remove what an interrupted save left there.

        All ranks must have called `check` before.
        """
        self._record = record
        self._ranks.wait()
        if self._ranks.world_size > 1:
            # Not with the first save: ranks that wait for a killed one to join a group hear no signal, and in the loop
            # they have asked for signals.
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        if self._ranks.first:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
            remove_leftovers(self._checkpoints)
            for checkpoint in self._damaged:  # the run will come to these steps again
                set_aside(checkpoint)
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
        """The newest checkpoint, or None. It may have been damaged since."""
        return next(reversed(checkpoints_in(self._checkpoints)), None)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        parts: Mapping[str, Any],
        *,
        average: MovingAverage | None = None,
    ) -> None:
        """Copy the trained parameters and the optimizer's state to CPU memory, and write them in the background.

        The checkpoint appears in the folder once it is complete. Checkpoints beyond `keep` are then removed.

        Args:
            step: the number of finished optimizer steps.
            model: the student. Frozen parameters are not saved.
            optimizer: the optimizer of the student's trainable parameters.
            parts: further objects with a state, by name. The first rank's state is saved. None is left out.
            average: the student's moving average, if that is its teacher.
        """
        if step in (0, self._saved_step):
            return
        try:
            self.wait()
        except CheckpointError as error:
            print(f"{error}; this one is written all the same", file=sys.stderr)
        self._saved_step = step
        target = self._checkpoints / f"step_{step:08d}"
        staged = target.with_name(STAGED + target.name)
        begun = self._begin(staged, {"step": step, "rng": self._ranks.collect(rng_state())}, parts)
        if (failed := self._ranks.collect(begun)[0]) is not None:
            written: Future[Any] = Future()
            written.set_exception(OSError(failed))
            self._pending = PendingCheckpoint(written, staged, target, self._keep if self._ranks.first else None)
            return
        weights, moments = get_state_dict(model, optimizer, options=TRAINED)
        with quiet():
            # Training communicates while checkpoints are written, so checkpoints need a group of their own. A single
            # process needs one if a library such as vLLM has made a group for GPUs only: `async_save` refuses that one.
            if self._group is None and dist.is_initialized():
                self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
            saved = async_save(
                {"model": weights, "optimizer": moments} | ({} if average is None else {"average": average.tensors}),
                checkpoint_id=staged,
                process_group=self._group,
                no_dist=self._ranks.world_size == 1,
            )
        assert isinstance(saved, Future)
        self._pending = PendingCheckpoint(saved, staged, target, self._keep if self._ranks.first else None)

    def _begin(self, staged: Path, facts: Mapping[str, Any], parts: Mapping[str, Any]) -> str | None:
        """Write what only the first rank writes; returns why it could not."""
        if not self._ranks.first:
            return None
        state = {name: part.state_dict() for name, part in parts.items() if part is not None}
        try:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            write_config(self._record, staged)
            with open(staged / STATE, "wb") as file:
                torch.save({**facts, "parts": state}, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's own, where its writer meets a full disk
            return why(error)
        return None

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; raise CheckpointError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def release(self) -> None:
        """Let other runs use the folder. The end of the process does the same."""
        if self._ranks.first:
            self._lock.release()

    def export(
        self, name: str, model: nn.Module, make_checkpointer: CheckpointerFactory, *, dtype: torch.dtype
    ) -> Path:
        """Write the model as a Hugging Face folder, OUTPUT_DIR/`name`, in `dtype`. Every rank must call."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=whole)  # complete on the first rank
        failed = None
        if self._ranks.first:
            try:
                export_model(weights, model, make_checkpointer, self.path / name, dtype=dtype)
            except (OSError, SafetensorError) as error:
                failed = why(error)
        if (failed := self._ranks.collect(failed)[0]) is not None:
            raise CheckpointError(f"{self.path / name} could not be written: {failed}. {ADVICE}")
        return self.path / name
