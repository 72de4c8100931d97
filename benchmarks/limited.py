"""Commands with a time limit, each with the processes that it starts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

_POLL_SECONDS = 0.1
_PROGRESS = re.compile(r"(\d+ tokens|batch \d+), ")  # what update_cost.py and rollout.py say of a finished case
STOP = threading.Event()  # ends every command that runs


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        problem: None if it did what it should, else why not, in a line.
    """

    problem: str | None
    out: str
    seconds: float


class Limit:
    """Runs commands until a number of seconds has passed; what still runs then is killed.

    Args:
        part: named before what is shown of a command's progress.
    """

    def __init__(self, part: str, seconds: float) -> None:
        self._part, self._seconds, self._end = part, seconds, time.monotonic() + seconds

    def run(self, command: Sequence[str], *, fine: Sequence[int] = (0,), env: Mapping[str, str] | None = None) -> Ended:
        """Run a command to its end. Its standard error is read for progress.

        Args:
            fine: exit statuses that are no problem.
            env: variables beside those of this process.
        """
        started = time.monotonic()
        if started >= self._end:
            return Ended("no time was left", "", 0.0)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            variables = {**os.environ, **(env or {})}
            process = subprocess.Popen(command, stdout=out, stderr=err, env=variables, start_new_session=True)
            try:
                shown = 0
                while process.poll() is None and time.monotonic() < self._end and not STOP.is_set():
                    time.sleep(_POLL_SECONDS)
                    shown = self._show(_text(err), shown)
                status = process.poll()
            finally:
                _kill(process)
            said, complaint = _text(out), _text(err)
        seconds = time.monotonic() - started
        if status is None:
            reason = "stopped" if STOP.is_set() else f"the part took longer than {self._seconds:.0f} s"
            return Ended(f"{reason}; last was: {last_line(complaint) or 'nothing'}", said, seconds)
        if status not in fine:
            return Ended(last_line(complaint) or last_line(said) or f"exit status {status}", said, seconds)
        return Ended(None, said, seconds)

    def _show(self, text: str, shown: int) -> int:
        whole = text.rfind("\n") + 1
        for line in text[shown:whole].splitlines():
            if _PROGRESS.match(line):
                print(f"  {self._part}: {line}", file=sys.stderr, flush=True)
        return max(shown, whole)


def last_line(text: str) -> str:
    """The line that says most: the last error of ours, or of Python; else the last line."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    errors = [line for line in lines if re.match(r"error( on rank \d+)?: ", line)]
    errors = errors or [line for line in lines if re.match(r"([\w.]+(Error|Exception)|RuntimeError)\b.*: ", line)]
    return (errors or lines or [""])[-1][:300]


def _text(file: IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a command with all of its processes, those included that outlived it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
