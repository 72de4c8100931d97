"""What grading costs: the start of a worker, a verdict, and an answer that no comparison would finish.

    python benchmarks/grading.py

The answers are fractions, roots and terms that the program makes up. Each is compared once, so no cache helps. What
counts is how long the caller waits. Writes a table to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from oprd_tune.grading import MathAnswer

RESULTS = Path(__file__).parent / "results"
ENDLESS = r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}"


def pairs(count: int) -> list[tuple[str, str]]:
    """Right answers that differ from their references in form."""
    forms = [
        (r"\frac{{{a}}}{{{b}}}", "{a}/{b}"),
        (r"{a}\sqrt{{{b}}}", r"\sqrt{{{b}}} \cdot {a}"),
        ("{a}x+{b}", "{b}+{a}x"),
        ("{a},-{b}", "-{b}, {a}"),
    ]
    found = []
    for i in range(count):
        response, reference = forms[i % len(forms)]
        numbers = {"a": 2 * i + 3, "b": 2 * i + 5}
        found.append((f"So it is $\\boxed{{{response.format(**numbers)}}}$.", reference.format(**numbers)))
    return found


def measure(workers: int, count: int, repeats: int, seconds: float) -> dict[str, Any]:
    """The seconds of a start, of a verdict among many, of one alone, and of an endless comparison."""
    starts, batches, alone = [], [], []
    for _ in range(repeats):
        grader = MathAnswer(workers=workers, seconds=seconds)
        start = time.perf_counter()
        assert grader.grade(pairs(workers)) == [True] * workers
        starts.append(time.perf_counter() - start)
        start = time.perf_counter()
        assert all(grader.grade(pairs(count)))
        batches.append((time.perf_counter() - start) / count)
        start = time.perf_counter()
        assert grader("The answer is 1/2.", "0.5")
        alone.append(time.perf_counter() - start)
        start = time.perf_counter()
        assert not grader(ENDLESS, "42")
        endless = time.perf_counter() - start
        grader.close()
    return {
        "workers": workers,
        "start": statistics.median(starts),
        "verdict": statistics.median(batches),
        "alone": statistics.median(alone),
        "endless": endless,
    }


def main() -> None:
    """Parse the command line, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="the time limit of a comparison")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = [measure(workers, args.count, args.repeats, args.seconds) for workers in args.workers]
    lines = [
        "# Grading of mathematical answers",
        "",
        f"{args.count:,} answers, a limit of {args.seconds:g} s. Median of {args.repeats}. {os.cpu_count()} CPU cores, "
        f"Python {platform.python_version()}, math-verify {version('math-verify')}. `python benchmarks/grading.py`",
        "",
        "| workers | workers start, s | a verdict among many, ms | a verdict alone, ms | an endless comparison, s |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['start']:.2f}", f"{row['verdict'] * 1e3:.1f}", f"{row['alone'] * 1e3:.1f}"]
        lines.append(f"| {row['workers']} | {' | '.join(cells)} | {row['endless']:.2f} |")
    args.out.mkdir(exist_ok=True)
    (args.out / "grading.md").write_text("\n".join(lines) + "\n")
    (args.out / "grading.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
