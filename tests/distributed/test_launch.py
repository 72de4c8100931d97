"""A recipe without torchrun's options: one process for each GPU, one message for each mistake."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from oprd_tune.failed_ranks import cause
from oprd_tune.registry import config_files, recipe_files
from oprd_tune.run.launcher import _processes_for
from tests.conftest import SMALL

SPREAD = {"teacher_placement": "sharded"}
# A host with two GPUs, as far as the launcher can tell; the processes themselves compute on the CPU.
DRIVER = """
import runpy, sys
from oprd_tune.run import launch

launch.__globals__["_processes_for"] = lambda device: 2
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def start(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)

    def start(recipe, config, folder, **overrides):
        words = [f"{key}={value}" for key, value in {**SMALL, **SPREAD, "output_dir": folder, **overrides}.items()]
        command = [sys.executable, str(driver), str(recipe_files()[recipe]), "--config", str(config_files()[config])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, *words], **pipes)

    return start


def test_every_device_gets_a_process_and_the_first_one_speaks(start, out):
    process = start("opd_topk_distributed", "tiny/opd_topk", out, **{"optimizer.lr": 1e-5})
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Starting 2 processes" in output
    assert output.count("optimizer steps") == 1
    assert json.loads((out / "summary.json").read_text())["world_size"] == 2
    assert [path.name for path in (out / "tensorboard").iterdir() if path.is_dir()] == ["teacher"]
    assert len(list((out / "tensorboard").glob("events*"))) == 1


@pytest.mark.long
def test_a_mistake_is_told_once(start, out):
    process = start("oprd_distributed", "tiny/oprd", out, layers="[9]")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.count("error:") == 1
    assert "error: layers has [9]; the student's layers count from 1 to 4" in errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: ")


def test_a_mistake_is_the_last_line_of_a_job_of_torchrun(tmp_path):
    tune = Path(sys.executable).with_name("tune")
    (tmp_path / "mine.py").write_text(recipe_files()["oprd_distributed"].read_text())
    command = [str(tune), "run", "--nproc_per_node", "2", "mine.py", "--config", "tiny/oprd", "layers=[9]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: layers has [9]; the student's layers count from 1 to 4")


@pytest.mark.long
def test_ranks_of_a_run_that_helped_nothing_end_together(start, out):
    process = start("oprd_distributed", "tiny/oprd", out, max_new_tokens=1, truncated_responses="drop", max_steps=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors
    assert errors.count("This run has failed (exit status 3): the student has not changed") == 1
    assert json.loads((out / "summary.json").read_text())["world_size"] == 2


def test_a_killed_rank_is_named(start, out):
    steps = {"max_steps": 100_000, "evaluate_every_n_steps": 100_000, "checkpoint_every_n_steps": 10}
    process = start("oprd_distributed", "tiny/oprd", out, **steps)
    while not list((out / "checkpoints").glob("step_*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    from tests.distributed.test_resume import children

    os.kill(children(process.pid)[1], signal.SIGKILL)
    started = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 20
    assert process.returncode == 128 + signal.SIGKILL
    assert re.search(r"rank 1 \(process \d+\) was ended by SIGKILL, so all others were stopped; resume=true", errors)
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        ({0: (-signal.SIGABRT, 100), 1: (-signal.SIGKILL, 100), 2: (1, 100)}, 1),
        ({0: (-signal.SIGABRT, 100), 1: (-signal.SIGKILL, 101)}, 1),
        ({0: (-signal.SIGTERM, 100), 1: (2, 100)}, 1),
        ({0: (-signal.SIGSEGV, 100), 1: (-signal.SIGKILL, 130)}, 0),
        ({0: (-signal.SIGABRT, 100), 1: (1, 130)}, 0),
    ],
)
def test_the_cause_is_told_from_what_followed_within_its_second(ends, first):
    failures = {rank: SimpleNamespace(exitcode=code, timestamp=second) for rank, (code, second) in ends.items()}
    assert cause(failures) == (first, failures[first])


def test_ranks_end_with_their_launcher(start, out):
    steps = {"max_steps": 100_000, "evaluate_every_n_steps": 100_000, "checkpoint_every_n_steps": 10}
    process = start("oprd_distributed", "tiny/oprd", out, **steps)
    while not list((out / "checkpoints").glob("step_*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    from tests.distributed.test_resume import children

    ranks = children(process.pid)
    assert len(ranks) == 2
    process.kill()
    _, errors = process.communicate(timeout=10)  # the ranks hold its pipes until they end
    assert not any(lives(rank) for rank in ranks)
    assert f"error: the launcher (process {process.pid}) is gone; resume=true goes on" in errors


@pytest.mark.parametrize("lives", [True, False])
def test_a_rank_ends_whose_launcher_was_gone_before_it_looked(lives):
    code = "from oprd_tune.run.process import end_with_launcher; end_with_launcher(); print('goes on')"
    with socket.socket() as meeting:
        meeting.bind(("127.0.0.1", 0))
        if lives:
            meeting.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.getsockname()[1])}
        launched = {**os.environ, **place, "TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        rank = subprocess.run([sys.executable, "-c", code], env=launched, capture_output=True, text=True, check=False)
    assert (rank.returncode, rank.stdout) == ((0, "goes on\n") if lives else (1, ""))
    assert lives or rank.stderr.splitlines()[-1] == "error: the launcher is gone; resume=true goes on"


def lives(pid):
    """Whether a process is there and no zombie, which waits for whatever reaps orphans here."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_cpu_host_starts_one_process(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert [_processes_for(device) for device in (None, "cuda", "cpu", "cuda:3")] == [8, 8, 1, 1]
