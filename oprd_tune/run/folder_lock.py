"""One run in one folder: a lock that lives and dies with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

FILE = "run.lock"
_SECONDS, _PAUSE = 3.0, 0.2  # how long a lock is tried, and how often
_HELD = (errno.EACCES, errno.EAGAIN)  # by someone else
# Descriptors of this process by path. The system drops a lock as soon as its process closes any descriptor of the file.
_OPEN: dict[Path, int] = {}


class FolderLock:
    """A lock on a folder, held from `take` to `release` or to the end of this process, however it ends.

    It is a POSIX lock on a file that stays. NFS knows such locks, and child processes that outlive a run do not hold
    it. A process may take its own lock again.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def refusal(self) -> str | None:
        """Take the lock; returns why this run may not use the folder, or None if the lock is ours now."""
        if (holder := self.take()) is None:
            return None
        return (
            f"output_dir {self._path.parent} is in use by another run, {holder}; stop that one, or give another "
            f"folder. If its host is gone, a file system may keep the lock for minutes; removing {FILE} ends it"
        )

    def take(self) -> str | None:
        """Take the lock; returns who else holds it, such as `process 17 on host a`, or None if it is ours now.

        It is tried for some seconds: a run that was killed may take a moment to die, and NFS one to notice. Where the
        file system has no locks, it is said on stderr and the run goes on. Raises OSError if the file cannot be
        written.
        """
        where = self._path.resolve()
        if where in _OPEN:
            return None
        descriptor = os.open(where, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if (error := _lock(descriptor)) is not None:
            holder = _holder(descriptor) if error.errno in _HELD else None
            os.close(descriptor)
            if holder is None:
                print(f"{self._path} cannot be locked ({error}), so a second run there goes unseen", file=sys.stderr)
            return holder
        me = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
        _OPEN[where] = descriptor
        return None

    def release(self) -> None:
        """Let others take the lock. The file stays, empty."""
        descriptor = _OPEN.pop(self._path.resolve(), None)
        if descriptor is not None:
            with contextlib.suppress(OSError):  # a full disk
                os.ftruncate(descriptor, 0)
            os.close(descriptor)


def release_all() -> None:
    """Let others use every folder that this process has locked."""
    for path in list(_OPEN):
        FolderLock(path.parent).release()


def _lock(descriptor: int) -> OSError | None:
    """Lock a file; returns why it still cannot be locked after some seconds."""
    end = time.monotonic() + _SECONDS
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except OSError as error:
            if error.errno not in (*_HELD, errno.ENOLCK) or time.monotonic() > end:
                return error
        time.sleep(_PAUSE)


def _holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {found['process']} on host {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
