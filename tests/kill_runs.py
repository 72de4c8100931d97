"""Kills runs at random instants, lets them go on, and compares what they leave with runs that nobody killed.

    python -m tests.kill_runs --kills 20 --seed 0

Each case is one run in one folder. It starts, is killed with SIGKILL, goes on, is killed again, and at last is left
alone. Half of the kills are aimed at a save; the others at a row of the log, a bridge's fit, the last export, or any
moment of the start. Within 10 seconds after a kill, no process of the run may be left. In the end, weights, bridge,
logs, samples and summary must be those of the same run without a kill, bit by bit, but for times and memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten
from typing import Any

from oprd_tune.registry import config_files, recipe_files
from tests.conftest import SMALL

SURVIVE_SECONDS = 10  # after a kill
STINT_SECONDS = 200  # from a start to its kill, or to the end of the run
MARK = "OPRD_TUNE_KILL_RUNS"  # a variable that every process of a run inherits
STEPS, STEPS_A_KILL = 12, 4
# What differs between any two runs of one config.
TIMES = ("seconds", "time/", "speed/", "memory/", "tokens_per_second", "peak_memory_bytes")

TRAINING: dict[str, object] = {
    **SMALL,
    **{"checkpoint_every_n_steps": STEPS_A_KILL, "evaluate_every_n_steps": 2, "optimizer.lr": 1e-5},
    "lr_scheduler._component_": "oprd_tune.training.constant_with_warmup",  # max_steps shapes a cosine
}
SELDOM: dict[str, object] = {"evaluate_every_n_steps": 1000}  # so that the first part ends without an evaluation
EVAL: dict[str, object] = {
    **{"eval.grader": "oprd_tune.grading.exact_match", "eval.max_new_tokens": 8, "eval.samples_per_problem": 2},
    **{"eval.every_n_steps": 1, "eval.problems_per_batch": 4, "eval.benchmarks.sums.split": "held_out"},
    **{"eval.benchmarks.sums._component_": "oprd_tune.tiny.addition", "eval.benchmarks.sums.count": 8},
}
BRIDGE: dict[str, object] = {"bridge.prompts": 64, "bridge.held_out_prompts": 16}
ANSWERS: dict[str, object] = {"benchmarks.addition.count": 60, "problems_per_batch": 2}


@dataclass(frozen=True)
class Case:
    """A run to kill.

    Attributes:
        kinds: what the kills are aimed at, by turns.
        victims: which process is killed, by turns: a rank, or the one that was started, which launches ranks if there
            are several.
        before: the overrides of a first part of the run, which a signal stops after a few steps; None without one.
    """

    config: str
    overrides: Mapping[str, object]
    kinds: Sequence[str]
    victims: Sequence[str] = ("run",)
    processes: int = 1
    before: Mapping[str, object] | None = None

    @property
    def trains(self) -> bool:
        """Whether it is a training run, not an evaluation."""
        return self.config != "tiny/eval"

    def command(self, overrides: Mapping[str, object]) -> list[str]:
        """What starts the run, or goes on with it."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        recipe = recipe_files()["oprd_distributed" if self.trains else "math_eval"]
        words = [f"{key}={value}" for key, value in overrides.items()]
        start = [sys.executable, *(launcher if self.processes > 1 else []), str(recipe)]
        return [*start, "--config", str(config_files()[self.config]), *words]

    def aims(self, kills: int) -> list[str]:
        """What each kill is aimed at. A bridge is fitted at the beginning, and the last export comes at the end."""
        found = [self.kinds[number % len(self.kinds)] for number in range(kills)]
        return sorted(found, key=lambda kind: {"fit": 0, "export": 2}.get(kind, 1))

    def whole(self, kills: int) -> dict[str, object]:
        """The overrides of a run that is long enough for so many kills."""
        steps = {"max_steps": STEPS + STEPS_A_KILL * kills, "resume": "true"}
        return {**self.overrides, **(steps if self.trains else {})}


CASES = {
    # The section `eval` is added after some steps: it is caught up, and the run is killed right after its answers.
    "one process": Case(
        "tiny/oprd",
        {**TRAINING, **SELDOM, **EVAL},
        kinds=("row", "save", "export", "save", "start", "save"),
        before={**TRAINING, **SELDOM, "max_steps": 100_000},
    ),
    "two ranks": Case(
        "tiny/oprd",
        {**TRAINING, "teacher_placement": "sharded", "teacher_quantization": "int8_weight_only"},
        kinds=("save", "start", "row", "save"),
        victims=("rank 1", "launcher", "rank 0", "launcher"),
        processes=2,
    ),
    "bridge": Case("tiny/bridge", {**TRAINING, **BRIDGE}, kinds=("fit", "save")),
    "math_eval": Case("tiny/eval", ANSWERS, kinds=("row", "start")),
}
_TURNS = ("one process", "two ranks", "bridge", "math_eval", "one process", "two ranks", "one process", "bridge")
_TURNS += ("two ranks", "one process")


def shares(kills: int) -> dict[str, int]:
    """How many of the kills each case gets."""
    counts = Counter(_TURNS[number % len(_TURNS)] for number in range(kills))
    return {name: counts[name] for name in CASES if counts[name]}


@dataclass
class Life:
    """What became of a run.

    Attributes:
        kills: what each kill was aimed at.
        saves: how many of them left a save unfinished.
        faults: what was wrong; empty if nothing was.
    """

    kills: list[str] = field(default_factory=list)
    saves: int = 0
    faults: list[str] = field(default_factory=list)


class FaultError(Exception):
    """Something went wrong with a run."""


class Run:
    """A run in a folder, that starts as often as it is killed."""

    def __init__(self, case: Case, folder: Path, overrides: Mapping[str, object]) -> None:
        self._case, self.folder, self._overrides = case, folder, overrides
        self._starts = 0
        self._mark = uuid.uuid4().hex

    def start(self) -> None:
        """Start, or go on."""
        self._log = self.folder.with_name(f"{self.folder.name}-{self._starts}.log")
        self._starts += 1
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                self._case.command({"output_dir": self.folder, **self._overrides}),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, MARK: self._mark},
            )

    def finish(self, expected: int = 0) -> None:
        """Wait for the end; raise FaultError if it comes with another status."""
        try:
            status = self.process.wait(STINT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill("run")
            raise FaultError(f"no end within {STINT_SECONDS} seconds: {self._said()}") from None
        if status != expected:
            raise FaultError(f"status {status}: {self._said()}")

    def wait(self, kind: str, count: int = 1) -> None:
        """Wait until something of a kind has happened so often; raise FaultError if the run ends before."""
        end, before = time.monotonic() + STINT_SECONDS, self._seen(kind)
        while count:
            time.sleep(0.002)
            if self.process.poll() is not None:
                raise FaultError(f"the run ended before a kill: {self._said()}")
            if time.monotonic() > end:
                self.kill("run")
                raise FaultError(f"nothing to aim at within {STINT_SECONDS} seconds: {self._said()}")
            now = self._seen(kind)
            count -= not now <= before  # a number is larger, or a set has something new
            before = now

    def unfinished(self) -> set[tuple[str, int]]:
        """The saves that have been cut."""
        return {(path.name, path.stat().st_mtime_ns) for path in self.folder.glob("checkpoints/.staged-*")}

    def _seen(self, kind: str) -> Any:
        """What grows whenever something of a kind happens."""
        if kind == "row":
            return sum(file.stat().st_size for file in self.folder.glob("[!.]*.jsonl"))
        if kind == "fit":
            return {word for word in ("Bridge:", "Solving:", "Held out:") if word in self._log.read_text()}
        return set((self.folder / "checkpoints" if kind == "save" else self.folder).glob(".staged-*"))

    def kill(self, victim: str, patience: float = SURVIVE_SECONDS) -> None:
        """Kill a process; raise FaultError if any of the run is left so many seconds later."""
        rank = f"\0RANK={victim.removeprefix('rank ')}\0"
        ranks = [pid for pid, variables in self._processes().items() if rank in variables]
        os.kill(ranks[0] if ranks else self.process.pid, signal.SIGKILL)
        end = time.monotonic() + patience
        while (left := self._processes()) and time.monotonic() < end:
            self.process.poll()
            time.sleep(0.05)
        self.end()
        if left:
            raise FaultError(f"{len(left)} processes are left {patience:.0f} seconds after the {victim} was killed")

    def end(self) -> None:
        """Kill whatever is left."""
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._starts:
            self.process.wait()

    def _processes(self) -> dict[int, str]:
        """The live processes of the run, with their variables. A zombie has none."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                variables = path.read_text(errors="replace")
                if self._mark in variables:
                    found[int(path.parent.name)] = f"\0{variables}"
        return found

    def _said(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-12:])


def live(name: str, kills: int, *, seed: int, folder: Path) -> Life:
    """Kill a case's run so many times, and compare what it leaves in the end with a run that nobody kills."""
    case, life, rng = CASES[name], Life(), random.Random(f"{seed} {name}")
    whole, run = (Run(case, folder / one, case.whole(kills)) for one in ("whole", "killed"))
    doing = "before any kill"
    try:
        if case.before is not None:
            first = Run(case, folder / "first", case.before)
            first.start()
            first.wait("save")
            first.process.terminate()
            first.finish(128 + signal.SIGTERM)
            for copy in (whole, run):
                shutil.copytree(first.folder, copy.folder)
        doing, began = "without a kill", time.monotonic()
        whole.start()
        whole.wait("row")
        seconds = time.monotonic() - began  # that a start takes
        whole.finish()
        for number, kind in enumerate(case.aims(kills)):
            victim = case.victims[number % len(case.victims)]
            doing = f"kill {number + 1}, aimed at {kind} of {victim}"
            before = run.unfinished()
            run.start()
            if kind != "start":
                run.wait(kind, rng.randint(1, 3) if kind == "row" else 1)
            time.sleep(rng.uniform(0, {"start": seconds, "row": 0.1, "fit": 0.3}.get(kind, 0.02)))
            # A rank that is still importing hears of its launcher's end only then.
            run.kill(victim, SURVIVE_SECONDS + (seconds if kind == "start" else 0))
            life.kills.append(kind)
            life.saves += not run.unfinished() <= before
        doing = "after all kills"
        run.start()
        run.finish()
        life.faults = list(differences(whole.folder, run.folder))
    except FaultError as fault:
        life.faults.append(f"{doing}: {fault}")
    finally:
        whole.end()
        run.end()
    return life


def differences(one: Path, other: Path) -> Iterator[str]:
    """In what two folders of runs differ, but for times and memory."""
    a, b = _content(one), _content(other)
    for name in sorted(a.keys() | b.keys()):
        if name not in b or name not in a:
            yield f"{name} is there {'only with' if name in b else 'only without'} kills"
        elif a[name] != b[name]:
            rows = zip_longest(a[name], b[name]) if isinstance(a[name], list) else [(a[name], b[name])]
            place, pair = next((place, pair) for place, pair in enumerate(rows, 1) if pair[0] != pair[1])
            yield f"{name}, line {place}: {' without kills, '.join(map(_short, pair))} with them"


def _content(folder: Path) -> dict[str, Any]:
    """What a run has left, by file: rows without times, digests of weights, and the mere names of all else."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith("tensorboard"):
            continue
        found[name] = ""
        if path.suffix == ".jsonl":
            rows = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
            # A problem whose answers were cut by a kill stands behind others.
            found[name] = sorted(rows, key=_place) if name == "samples.jsonl" else rows
        elif name == "summary.json":
            found[name] = _timeless(json.loads(path.read_text()))
        elif name.startswith(("final", "best", "bridge.safetensors")):
            found[name] = _digest(path)
    return found


def _digest(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".safetensors":  # whose facts about the file stand in any order
        data = 8 + int.from_bytes(content[:8], "little")
        content = json.dumps(json.loads(content[8:data]), sort_keys=True).encode() + content[data:]
    return hashlib.sha256(content).hexdigest()


def _short(value: Any) -> str:
    return shorten(str(value), 300, placeholder=" …")


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if not key.startswith(TIMES)}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def _place(sample: dict[str, Any]) -> list[Any]:
    return [sample[key] for key in ("model", "benchmark", "problem", "number")]


def main() -> int:
    """Kill the runs, print what became of each, and return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="runs at the same time; each takes a core or two")
    parser.add_argument("--case", choices=list(CASES), help="all kills for one case")
    asked = parser.parse_args()
    counts = {asked.case: asked.kills} if asked.case else shares(asked.kills)
    began, faults = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(asked.at_once) as pool:
        folders = {name: Path(scratch) / name.replace(" ", "_") for name in counts}
        for folder in folders.values():
            folder.mkdir()
        started = {
            name: pool.submit(live, name, kills, seed=asked.seed, folder=folders[name])
            for name, kills in counts.items()
        }
        for name, future in started.items():
            life = future.result()
            aims = ", ".join(f"{kind} {count}" for kind, count in Counter(life.kills).items())
            told = "the same as without a kill" if not life.faults else f"{len(life.faults)} faults"
            print(f"{name:<12} {len(life.kills):>2} kills ({aims}), {life.saves} cut a save: {told}", flush=True)
            print("".join(f"  ! {fault}\n" for fault in life.faults), end="", flush=True)
            faults += len(life.faults)
    print(f"seed {asked.seed}, {time.monotonic() - began:.0f} seconds, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
