"""The last step of a checkpoint: once it is written it takes its place, or is removed if it could not be written."""

from __future__ import annotations

import os
import re
import shutil
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from oprd_tune.errors import CheckpointError
from oprd_tune.modeling.safe_reading import why
from oprd_tune.run.export import STAGED, remove
from oprd_tune.run.manifest import write_manifest

ADVICE = "Earlier checkpoints are kept; free some space, or lower keep_checkpoints, and continue with resume=true"
_NAME = re.compile(r"step_(\d{8}|[1-9]\d{8,})")


class PendingCheckpoint:
    """A checkpoint that is being written. The first rank publishes it once all ranks have written their parts.

    Args:
        written: done when all ranks have written.
        staged: the folder that is being written.
        target: its place.
        keep: the number of checkpoints to keep on the first rank; None on the others.
    """

    def __init__(self, written: Future[Any], staged: Path, target: Path, keep: int | None) -> None:
        self._written, self._staged, self._target, self._keep = written, staged, target, keep
        self._lock, self._is_published = threading.Lock(), False
        if keep is not None:
            written.add_done_callback(self._publish_in_background)

    def wait(self) -> None:
        """Wait until the checkpoint is in its place; raise CheckpointError, and remove it, if it cannot get there."""
        try:
            self._written.result()
            if self._keep is not None:
                self._publish()
        except (Exception, CheckpointException) as error:  # the library's own exception does not derive from Exception
            if self._keep is not None:
                shutil.rmtree(self._staged, ignore_errors=True)
            raise CheckpointError(f"{self._target} could not be written: {why(error)}. {ADVICE}") from error

    def _publish_in_background(self, written: Future[Any]) -> None:
        if written.exception() is None:
            with suppress(OSError):  # `wait` tries again, and tells
                self._publish()

    def _publish(self) -> None:
        with self._lock:
            if self._is_published:  # the callback and `wait` both come here
                return
            if os.path.lexists(self._target):  # a file or a link of that name
                set_aside(self._target)
            os.replace(self._staged, self._target)
            self._is_published = True
            for old in checkpoints_in(self._target.parent)[: -self._keep]:  # type: ignore[operator]
                doomed = old.with_name(STAGED + old.name)  # a crash then leaves no half-removed checkpoint
                os.replace(old, doomed)
                shutil.rmtree(doomed, ignore_errors=True)
            write_manifest(self._target)  # after it is safe: a large checkpoint takes a while to read again


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders that look exactly like a checkpoint of ours, the oldest first. Copies, archives and links do not."""
    found = [entry for entry in folder.glob("step_*") if _NAME.fullmatch(entry.name)]
    return sorted((entry for entry in found if entry.is_dir() and not entry.is_symlink()), key=step_of)


def set_aside(path: Path) -> None:
    """Rename what stands in the place of a checkpoint, so that it does not count and can still be looked at."""
    aside = path.with_name(f"{path.name}.set_aside")
    remove(aside)
    os.replace(path, aside)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step_"))
