"""Where the parts of gpu_check.py run, and what they find."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_cases import Case, command_of, environment, logged
from limited import Ended, Limit

FINISHED = (0, 3)  # 3: to its end, but the student is worse than before, which a few steps may bring about


@dataclass(frozen=True)
class Bench:
    """Where the parts run.

    Attributes:
        facts: see gpu_probe.py.
        work: a folder for runs and random weights.
        jobs: runs of embedded models at a time.
        words: overrides of each of these runs.
        full: whether a CPU does all cases that it can.
    """

    facts: Mapping[str, Any]
    work: Path
    jobs: int
    words: tuple[str, ...] = ()
    full: bool = False

    @property
    def device(self) -> str:
        """`cuda` or `cpu`."""
        return str(self.facts["device"])

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real thing, not the small one."""
        return self.device == "cuda"

    def script(self, name: str, *words: object) -> list[str]:
        """The command of another script in this folder."""
        return [sys.executable, str(Path(__file__).parent / name), *map(str, words)]


@dataclass
class Found:
    """What a part has found.

    Attributes:
        rows: of its table; all have the same keys.
        figures: numbers that bars, and other figures, are made of.
        failed: what failed, and why.
        note: a sentence.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0


def train(bench: Bench, limit: Limit, case: Case, folder: str, *words: str) -> tuple[Ended, dict[str, Any]]:
    """A run of a case, and its row."""
    out = bench.work / folder
    command = command_of(case, out, bench.device, (*words, *bench.words))
    ended = limit.run(command, fine=FINISHED, env=environment(bench.device))
    steps = logged(out)
    problem = ended.problem
    if problem is None and steps and not math.isfinite(steps[-1]["loss/total"]):
        problem = "its loss is not finite"
    loss = f"{steps[-1]['loss/total']:.4g}" if steps else "–"
    row = {"case": case.name, "result": f"failed: {problem}" if problem else "ok", "seconds": f"{ended.seconds:.0f}"}
    print(f"  {case.name}: {row['result']}, {row['seconds']} s", file=sys.stderr, flush=True)
    return Ended(problem, ended.out, ended.seconds), row | {"final loss": loss}


def as_found(results: list[tuple[Ended, dict[str, Any]]]) -> Found:
    """The rows of runs, and which failed."""
    rows = [row for _, row in results]
    return Found(rows, failed=[f"{row['case']} ({ended.problem})" for ended, row in results if ended.problem])
