"""One run, one folder: none beside a live one, none over a finished one, and none is kept out by a dead one."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from oprd_tune.errors import ConfigError
from oprd_tune.registry import config_files, recipe_files
from oprd_tune.run.folder import RunFolder
from oprd_tune.run.folder_lock import FILE, FolderLock
from oprd_tune.run.launcher import run_recipe
from tests.conftest import SMALL, load_config, recipe_class
from tests.distributed.spawn import run_ranks

NAME, CONFIG = "oprd_distributed", "tiny/oprd"
LOCKF = "oprd_tune.run.folder_lock.fcntl.lockf"
HOLD = """
import sys, time
from pathlib import Path
from oprd_tune.run.folder_lock import FolderLock
print(FolderLock(Path(sys.argv[1])).take(), flush=True)
time.sleep(120)
"""


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch):
    monkeypatch.setattr("oprd_tune.run.folder_lock._SECONDS", 0.3)


def holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "None\n"
    return process


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_run_is_told_who_runs_there_and_a_killed_one_keeps_nobody_out(out, resume):
    out.mkdir()
    first = holder(out)
    with pytest.raises(ConfigError) as refused:
        RunFolder(str(out), keep=1).check(resume=resume)
    told = rf"output_dir {out} is in use by another run, process {first.pid} on host \S+, since [-\d: ]+; stop that one"
    assert re.match(told, str(refused.value))
    first.kill()
    first.wait()
    assert RunFolder(str(out), keep=1).check(resume=resume) is None
    FolderLock(out).release()


def test_a_lock_is_free_once_it_is_released_and_its_file_stays(tmp_path):
    lock = FolderLock(tmp_path)
    assert lock.take() is None
    assert lock.take() is None  # a process that goes on in its own folder
    assert FolderLock(tmp_path).take() is None
    lock.release()
    lock.release()
    assert (tmp_path / FILE).read_text() == ""
    process = holder(tmp_path)
    assert f"process {process.pid} on host" in lock.take()
    process.kill()
    process.wait()


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(LOCKF, none)
    assert FolderLock(tmp_path).take() is None
    assert "cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES, errno.ENOLCK])
def test_a_lock_that_lingers_for_a_moment_keeps_nobody_out(tmp_path, monkeypatch, capsys, number):
    """As on NFS, when its client has just died."""
    lock, tries = fcntl.lockf, []

    def linger(*args):
        tries.append(args)
        if len(tries) < 2:
            raise OSError(number, "not yet")
        lock(*args)

    monkeypatch.setattr(LOCKF, linger)
    assert FolderLock(tmp_path).take() is None
    assert f'"process": {os.getpid()}' in (tmp_path / FILE).read_text()
    assert capsys.readouterr().err == ""
    FolderLock(tmp_path).release()


def evaluation(folder):
    words = [f"output_dir={folder}", "benchmarks.addition.count=400", "problems_per_batch=1"]
    command = [sys.executable, str(recipe_files()["math_eval"]), "--config", str(config_files()["tiny/eval"]), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_two_evaluations_at_once_in_one_folder(out, capsys):
    first = evaluation(out)
    end = time.monotonic() + 120
    while not (out / "samples.jsonl").exists():
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    cfg = load_config("tiny/eval", output_dir=out, problems_per_batch=1, **{"benchmarks.addition.count": 400})
    told = rf"output_dir {out} is in use by another run, process {first.pid} on host \S+, since [-\d: ]+; stop that one"
    assert run_recipe(recipe_class("math_eval"), cfg) == 2
    assert re.search(told, capsys.readouterr().err)
    with pytest.raises(ConfigError, match=told):
        RunFolder(str(out), keep=1).check(resume=False)  # nor may a training run
    first.kill()
    first.communicate()
    cfg.models = {"student": "tiny/student"}
    cfg.problems_per_batch = 400
    assert run_recipe(recipe_class("math_eval"), cfg) == 0
    assert (out / FILE).read_text() == ""  # which others may use now


def on_two_ranks(rank, folder):
    sys.stderr = open(folder / f"{rank}.err", "w")  # noqa: SIM115 - as long as the process
    assert run_recipe(recipe_class("math_eval"), load_config("tiny/eval", output_dir=folder / "out")) == 2
    sys.stderr.flush()


@pytest.mark.long
def test_every_rank_of_an_evaluation_is_told(tmp_path):
    (tmp_path / "out").mkdir()
    process = holder(tmp_path / "out")
    run_ranks(on_two_ranks, 2, tmp_path / "ranks", tmp_path)
    process.kill()
    process.wait()
    assert all(f"another run, process {process.pid}" in (tmp_path / f"{rank}.err").read_text() for rank in range(2))


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("left", ["final", "summary.json"])
def test_a_finished_run_without_checkpoints_is_not_overwritten(out, left, resume):
    out.mkdir()
    (out / left).mkdir() if left == "final" else (out / left).touch()
    with pytest.raises(ConfigError, match=f"holds another run: there is {left}, and no checkpoint .*another folder"):
        RunFolder(str(out), keep=1).check(resume=resume)


def command(folder, *extra):
    overrides = {**SMALL, "max_steps": 100_000, "evaluate_every_n_steps": 100_000, "checkpoint_every_n_steps": 1}
    words = [f"{key}={value}" for key, value in overrides.items()]
    config = str(config_files()[CONFIG])
    return [sys.executable, str(recipe_files()[NAME]), "--config", config, f"output_dir={folder}", *words, *extra]


def test_two_runs_at_once_in_one_folder(out):
    first = subprocess.Popen(command(out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 120
    while not list((out / "checkpoints").glob("step_*")):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < end
        time.sleep(0.2)
    second = subprocess.run(command(out, "resume=true"), capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert f"is in use by another run, process {first.pid} on host" in second.stderr.splitlines()[-1]
    first.kill()
    first.communicate()
    third = subprocess.Popen(command(out, "resume=true"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    reached = ""
    while "Resuming after step" not in reached:
        reached = third.stdout.readline()
        assert reached
    third.send_signal(signal.SIGKILL)
    third.communicate()
