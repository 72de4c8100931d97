"""The end of a job of several ranks: one line, where torchrun has a traceback."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from oprd_tune.registry import recipe_files

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_TORCHRUNS_LOGGER = "torch.distributed.elastic.multiprocessing.api"


def cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank whose end was the first, and how it ended.

    Ends are dated to the second. Within one, a rank that was killed comes before those that say what they had lost, and
    these before those that gloo (SIGABRT) or the launcher (SIGTERM) ended.
    """
    start = min(failure.timestamp for failure in failures.values())
    together = {rank: failure for rank, failure in failures.items() if failure.timestamp <= start + 1}

    def place(rank: int) -> tuple[bool, bool]:
        exitcode = together[rank].exitcode
        return exitcode in (-signal.SIGABRT, -signal.SIGTERM), exitcode > 0

    first = min(together, key=place)
    return first, together[first]


def tell(failures: Mapping[int, ProcessFailure]) -> int:
    """Print what ended the job, unless the rank itself has said it; returns the exit status."""
    rank, failure = cause(failures)
    if failure.exitcode >= 0:
        return failure.exitcode
    name = signal.Signals(-failure.exitcode).name
    print(
        f"error: rank {rank} (process {failure.pid}) was ended by {name}, so all others were stopped; resume=true "
        "continues from the last checkpoint",
        file=sys.stderr,
    )
    return 128 - failure.exitcode


def quieten_torchrun() -> None:
    """Let torchrun not log, after a rank's own message, which ranks have ended."""
    logging.getLogger(_TORCHRUNS_LOGGER).setLevel(logging.CRITICAL)


def end_quietly(words: Sequence[str]) -> None:
    """If the words after `tune` run one of our recipes or a copy, end this process as our launcher does.

    `tune run --nproc_per_node 2` calls torchrun within this process, and its error would end it in a traceback.
    """
    known = recipe_files()
    if words[:1] != ["run"] or not any(word in known or is_ours(Path(word)) for word in words):
        return
    quieten_torchrun()
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if kind.__name__ != "ChildFailedError":
            return usual(kind, error, trace)
        raise SystemExit(tell(error.failures))  # type: ignore[attr-defined]

    sys.excepthook = hook


def is_ours(path: Path) -> bool:
    """Whether a file is a recipe that uses this package."""
    try:
        return path.suffix == ".py" and "oprd_tune" in path.read_text()
    except (OSError, ValueError):
        return False
