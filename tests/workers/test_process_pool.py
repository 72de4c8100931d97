"""Workers that hang, die or never start are replaced or explained, and none outlives its parent."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from oprd_tune.grading.graders import WORKER
from oprd_tune.workers.process_pool import ProcessPool

# Jobs: a number is doubled; a text names a mishap.
JOBS = """
import os, sys, time
sys.path.insert(0, {folder!r})
from serving import serve

def make_job():
    {setup}
    def job(value):
        if value == "sleep":
            time.sleep(60)
        if value == "count":
            return 5 ** (5 ** (5 ** 5))
        if value == "exit":
            os._exit(3)
        if value == "memory":
            return len(bytearray(3 * 2**30))
        if value == "print":
            print("noise", flush=True)
            return "silent"
        if value == "pid":
            time.sleep(0.02)  # so that no worker does all the work while another one waits for its turn on the CPU
            return os.getpid()
        return value * 2
    return job

serve(make_job)
"""


@pytest.fixture
def make_pool(tmp_path):
    pools = []

    def make(setup="pass", seconds=1.0, workers=2, megabytes=1024):
        program = tmp_path / f"program_{len(pools)}.py"
        program.write_text(JOBS.format(folder=str(WORKER.parent), setup=setup))
        pools.append(ProcessPool(program, seconds=seconds, workers=workers, megabytes=megabytes))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until_gone(pids, seconds):
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left


def test_results_come_in_order_from_several_processes(make_pool):
    pool = make_pool()
    assert pool.pids == []  # they start with the first job
    assert pool.run(list(range(50))) == [2 * i for i in range(50)]
    assert len(set(pool.run(["pid"] * 50))) == 2 == len(pool.pids)
    assert pool.run([]) == []


def test_a_hanging_worker_is_replaced(make_pool):
    pool = make_pool()
    first = pool.run(["pid"])
    assert pool.run([1, "sleep", 2, "sleep", 3]) == [2, None, 4, None, 6]
    assert (pool.late, pool.died) == (2, 0)
    assert wait_until_gone([*first], 1) or first[0] in pool.pids


def test_a_worker_that_cannot_be_interrupted_is_replaced(make_pool):
    pool = make_pool(workers=1)
    assert pool.run(["count", 1]) == [None, 2]
    assert pool.late == 1


def test_a_dying_worker_is_replaced(make_pool):
    pool = make_pool()
    assert pool.run([1, "exit", 2, "exit", 3, "exit"]) == [2, None, 4, None, 6, None]
    assert (pool.late, pool.died) == (0, 3)


def test_memory_is_limited(make_pool):
    pool = make_pool(megabytes=512, seconds=20)
    assert pool.run(["memory", 1]) == [None, 2]
    assert pool.died == 1


def test_an_idle_worker_that_died_costs_no_verdict(make_pool):
    pool = make_pool(workers=1)
    pool.run([1])
    os.kill(pool.pids[0], signal.SIGKILL)
    time.sleep(0.2)
    assert pool.run([1, 2]) == [2, 4]
    assert (pool.late, pool.died) == (0, 0)


def test_what_a_job_prints_is_no_answer(make_pool):
    assert make_pool().run(["print", 1]) == ["silent", 2]


def test_an_interrupt_leaves_no_stale_answer(make_pool):
    pool = make_pool(workers=1, seconds=30)
    pool.run([1])
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.run(["sleep"])
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert pool.pids == []
    assert pool.run([4]) == [8]


@pytest.mark.parametrize(
    ("setup", "message"),
    [("import nowhere", "does not start: ModuleNotFoundError: No module named 'nowhere'"), ("os._exit(7)", "exit 7")],
)
def test_workers_that_cannot_start_are_explained(make_pool, setup, message):
    with pytest.raises(ChildProcessError, match=message):
        make_pool(setup).run([1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("job", "seconds"), [(1, 5), ("sleep", 5), ("count", 8)])
def test_no_worker_outlives_a_killed_parent(tmp_path, job, seconds):
    program = tmp_path / "program.py"
    program.write_text(JOBS.format(folder=str(WORKER.parent), setup="pass"))
    parent = tmp_path / "parent.py"
    parent.write_text(
        textwrap.dedent(f"""
            import json, sys, threading, time
            from pathlib import Path
            from oprd_tune.workers.process_pool import ProcessPool
            pool = ProcessPool(Path({str(program)!r}), seconds=3, workers=2, megabytes=1024)
            pool.run([1] * 20)
            print(json.dumps(pool.pids), flush=True)
            pool.run([{job!r}] * 2)
            time.sleep(60)
        """)
    )
    process = subprocess.Popen([sys.executable, str(parent)], stdout=subprocess.PIPE)
    pids = json.loads(process.stdout.readline())
    assert len(pids) == 2
    assert all(map(is_running, pids))
    time.sleep(0.3)  # the second jobs are at work
    process.kill()
    process.wait()
    process.stdout.close()
    assert wait_until_gone(pids, seconds)
