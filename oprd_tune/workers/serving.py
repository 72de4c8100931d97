"""The loop of a worker process: it reads a line of JSON with a job, and writes a line of JSON with the result.

A job that takes too long, or too much memory, ends the process: `process_pool.py` starts another one. The process also
ends when its parent is gone. A program that calls `serve` is started by its path, so it imports neither torch nor this
package.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

_WATCH_SECONDS = 1.0


def serve(make_job: Callable[[], Callable[[Any], Any]]) -> None:
    """Answer jobs until the parent closes the pipe.

    The first argument of the command line is JSON with `seconds` (of one job), `megabytes` (of address space; 0 sets no
    limit) and `parent` (its process id).

    Args:
        make_job: imports what jobs need, and gives the function that does one. It must take and give plain values.
    """
    settings = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # what a library prints is no answer
    threading.Thread(target=_end_with_parent, args=(settings["parent"],), daemon=True).start()
    try:
        _limit_memory(settings["megabytes"])
        job = make_job()
    except BaseException as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        raise
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin.buffer:
        # The kernel keeps this deadline, so it also ends one long operation on whole numbers, and an orphan's last job.
        signal.setitimer(signal.ITIMER_REAL, settings["seconds"] + 1)
        result = job(json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        is_last = _is_large(settings["megabytes"])  # caches have grown: the next job gets a new process
        print(json.dumps({"result": result, "last": is_last}), file=answers, flush=True)
        if is_last:
            return


def _end_with_parent(parent: int) -> None:
    watch = select.poll()
    watch.register(0, 0)  # reports no more than the end of the pipe
    while os.getppid() == parent and not watch.poll(_WATCH_SECONDS * 1000):
        pass
    os._exit(0)


def _limit_memory(megabytes: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # a system may have no limits, or lower ones
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if megabytes:
            resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, megabytes * 2**20))


def _is_large(megabytes: int) -> bool:
    """Whether this process holds half of its memory; false where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return False
    return megabytes > 0 and pages * os.sysconf("SC_PAGE_SIZE") > megabytes * 2**19
