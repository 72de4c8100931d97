"""A pool of worker processes that answer jobs within a time limit. Whatever a job does, it does to a worker alone."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_START_SECONDS = 120.0  # the imports of many processes from one network disk
_MOST_FAILED_STARTS = 3


class _Worker:
    """A worker process: starting until it says so, then idle or at work on one job."""

    def __init__(self, program: Path, seconds: float, megabytes: int) -> None:
        settings = json.dumps({"seconds": seconds, "megabytes": megabytes, "parent": os.getpid()})
        # A new program, not a fork of this one: CUDA and torch's threads do not survive a fork.
        self.process = subprocess.Popen(
            [sys.executable, str(program), settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPRD_TUNE_NO_HOOK": "1"},
        )
        self.is_ready = False
        self.job: int | None = None
        self.deadline = time.monotonic() + _START_SECONDS
        self._seconds = seconds
        self._read = bytearray()

    def send(self, number: int, job: Any) -> bool:
        """Hand out a job; False if the process has ended before."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job, default=str).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return False
        self.job, self.deadline = number, time.monotonic() + self._seconds
        return True

    def receive(self) -> bytes | None:
        """The line that the process has written; None if only a part of it is here, and nothing if it has ended."""
        assert self.process.stdout is not None
        part = os.read(self.process.stdout.fileno(), 65536)
        self._read += part
        if part and not self._read.endswith(b"\n"):
            return None
        line, self._read = bytes(self._read), bytearray()
        return line if part else b""

    def end(self) -> None:
        """Kill the process and free what belongs to it."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # a job that was never read
                pipe.close()
        self.process.wait()


class ProcessPool:
    """Runs jobs in persistent worker processes, each job within a time limit.

    Workers start with the first jobs. One that is late or ends is replaced. They end with this process, however it
    ends: an idle one at once, one at work within its time limit. After a fork, the child starts workers of its own.
    Several threads may call; one call waits for the other.

    Args:
        program: a Python file that calls `serving.serve`.
        seconds: the time limit of a job.
        workers: the most processes at once.
        megabytes: address space of a worker, where the system can limit it; 0 sets no limit.
        idle_seconds: workers end when no job has come for so long; None keeps them.

    Attributes:
        seconds: as given.
        late: how many jobs exceeded the time limit.
        died: how many jobs ended their process, for example by taking too much memory.
    """

    def __init__(
        self, program: Path, *, seconds: float, workers: int, megabytes: int, idle_seconds: float | None = None
    ) -> None:
        self._program = program
        self.seconds = seconds
        self._idle_seconds = idle_seconds
        self._idle: threading.Timer | None = None
        self._most = workers
        self._megabytes = megabytes
        self.late = self.died = 0
        self._forget()

    def run(self, jobs: Sequence[Any]) -> list[Any]:
        """The results of jobs, in their order; None for one that was late or died.

        Jobs and results are values of JSON; what JSON does not have is sent as its text.

        Raises:
            ChildProcessError: if workers cannot start. The message says why.
        """
        if os.getpid() != self._owner:
            self._forget()
        with self._lock:
            results: list[Any] = [None] * len(jobs)
            waiting = deque(range(len(jobs)))
            try:
                while waiting or any(worker.job is not None for worker in self._workers):
                    self._hand_out(jobs, waiting)
                    for worker, is_late in self._worth_a_look():
                        self._look_at(worker, is_late, results)
            finally:  # after an interrupt, a worker still at work would answer the next call
                for worker in [worker for worker in self._workers if worker.job is not None]:
                    self._remove(worker)
                self._close_when_idle()
            return results

    def close(self) -> None:
        """End the workers. A later call starts new ones."""
        with self._lock:
            for worker in list(self._workers):
                self._remove(worker)

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def _close_when_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        if self._idle_seconds is not None:
            self._idle = threading.Timer(self._idle_seconds, self.close)
            self._idle.daemon = True
            self._idle.start()

    def _forget(self) -> None:
        self._owner = os.getpid()
        self._idle = None
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def _hand_out(self, jobs: Sequence[Any], waiting: deque[int]) -> None:
        for worker in [worker for worker in self._workers if worker.is_ready and worker.job is None]:
            if waiting and not worker.send(waiting[0], jobs[waiting[0]]):
                self._remove(worker)
            elif waiting:
                waiting.popleft()
        coming = sum(not worker.is_ready for worker in self._workers)
        for _ in range(min(self._most - len(self._workers), len(waiting) - coming)):
            self._workers.append(_Worker(self._program, self.seconds, self._megabytes))

    def _worth_a_look(self) -> list[tuple[_Worker, bool]]:
        """Wait until a worker has written, has ended or is late; returns those workers, and whether they are late."""
        with selectors.DefaultSelector() as selector:
            expected = [worker for worker in self._workers if worker.job is not None or not worker.is_ready]
            for worker in expected:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            left = min((worker.deadline for worker in expected), default=0.0) - time.monotonic()
            written = [key.data for key, _ in selector.select(max(left, 0.0))]
        now = time.monotonic()
        late = [worker for worker in expected if worker not in written and worker.deadline <= now]
        return [(worker, False) for worker in written] + [(worker, True) for worker in late]

    def _look_at(self, worker: _Worker, is_late: bool, results: list[Any]) -> None:
        line = b"" if is_late else worker.receive()
        if line is None:
            return
        if not worker.is_ready:
            self._admit(worker, line, is_late)
        elif not line:
            self.late, self.died = self.late + is_late, self.died + (not is_late)
            self._remove(worker)
        else:
            assert worker.job is not None
            said = json.loads(line)
            results[worker.job], worker.job = said["result"], None
            if said["last"]:
                self._remove(worker)

    def _admit(self, worker: _Worker, line: bytes, is_late: bool) -> None:
        said = json.loads(line) if line else {}
        if "ready" in said:
            worker.is_ready, self._failed_starts = True, 0
            return
        self._remove(worker)
        self._failed_starts += 1
        reason = f"it was not ready after {_START_SECONDS:.0f} s" if is_late else f"exit {worker.process.returncode}"
        if "error" in said or self._failed_starts >= _MOST_FAILED_STARTS:
            self._failed_starts = 0
            raise ChildProcessError(f"{self._program.name} does not start: {said.get('error', reason)}")

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.end()
