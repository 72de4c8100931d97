"""Accuracy of every objective on the embedded pair: the papers' comparison on a laptop.

    python benchmarks/objectives.py --jobs 2             all of it; about twenty minutes on two cores
    python benchmarks/objectives.py --objectives OPRD vOPD --steps 100

Every objective sees the same prompts, the same number of rollouts and the same schedule. Its learning rate is the best
of its grid on seed 0; what is reported are other seeds at that rate. Each run is a process of its own, on one thread.
Writes a table, the numbers and a plot to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from oprd_tune.compare.past_run import run_of_summary
from oprd_tune.compare.picture import AXES, Panel, draw
from oprd_tune.compare.seed_groups import Group
from oprd_tune.registry import config_files, recipe_files, recipe_named_in

RESULTS = Path(__file__).parent / "results"
DETACHED = ("loss._component_=oprd_tune.losses.DetachedTopKReverseKL", "~loss.support")


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        config: its config.
        rates: learning rates to try.
        overrides: of the config.
        recipe: a file to run instead of the config's recipe.
        first: a case that takes the first half of the steps, at its first rate, and leaves its student to this one.
    """

    config: str
    rates: tuple[float, ...]
    overrides: tuple[str, ...] = ()
    recipe: Path | None = None
    first: Case | None = None


OBJECTIVES = {
    "OPRD": Case("tiny/oprd", (3e-3, 6e-3, 1e-2)),
    "OPRD + 0.1 full KL": Case("tiny/oprd_plus_opd", (3e-3, 6e-3, 1e-2)),
    "full KL": Case("tiny/opd_full", (3e-4, 1e-3, 3e-3)),
    "top-4": Case("tiny/opd_topk", (3e-4, 6e-4, 1e-3)),
    "top-4, detached": Case("tiny/opd_topk", (1e-4, 3e-4, 6e-4), DETACHED),
    "vOPD": Case("tiny/vopd", (1e-4, 3e-4, 6e-4)),
    "vOPD, top-4 baseline": Case("tiny/vopd", (1e-4, 3e-4, 6e-4), ("loss.baseline_k=4",)),
    "sampled token": Case("tiny/opd_sampled", (6e-5, 1.5e-4, 3e-4)),
}
SEEDS = (1, 2, 3)
DIVERGED = {"student_after": None}  # instead of a summary, after too many steps that were not finite


def run(case: Case, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """One training run; returns its summary, or DIVERGED."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        if case.first is None:
            return _train(case, rate, seed, steps, second, [])
        before = _train(case.first, case.first.rates[0], seed, steps // 2, first, [])
        if before == DIVERGED:
            return DIVERGED
        student = [f"student={first / 'final'}"]
        return _one_after_the_other(before, _train(case, rate, seed, steps - steps // 2, second, student))


def _one_after_the_other(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The summary of two runs as if they were one."""
    if second == DIVERGED:
        return DIVERGED
    start, steps, seconds = first["student_before"], first["steps"], first["seconds"]
    shift = [e | {"step": e["step"] + steps, "seconds": e["seconds"] + seconds} for e in second["evaluations"][1:]]
    return second | {
        "student_before": start,
        "gap_closed": (second["student_after"] - start) / (second["teacher"] - start),
        "steps": steps + second["steps"],
        "seconds": seconds + second["seconds"],
        "evaluations": first["evaluations"] + shift,
    }


def _train(case: Case, rate: float, seed: int, steps: int, folder: Path, words: list[str]) -> dict[str, Any]:
    finite = launch(case, rate, seed, steps, folder, words)
    return json.loads((folder / "summary.json").read_text()) if finite else DIVERGED


def launch(case: Case, rate: float, seed: int, steps: int, folder: Path, words: list[str]) -> bool:
    """Run a case, with `words` after its overrides, in `folder`; False if too many steps were not finite."""
    config = config_files()[case.config]
    words = [*case.overrides, *words, f"output_dir={folder}", f"optimizer.lr={rate}", f"seed={seed}"]
    words += [f"max_steps={steps}", f"checkpoint_every_n_steps={steps}", f"metric_logger.log_dir={folder}"]
    recipe = case.recipe or recipe_files()[str(recipe_named_in(config))]
    command = [sys.executable, str(recipe), "--config", str(config), *words]
    own_modules = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": own_modules}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "not finite" in result.stderr:
        return False
    if result.returncode not in (0, 3):  # 3: worse than before, which is a result
        sys.exit(result.stderr)
    return True


def measure(cases: Mapping[str, Case], args: argparse.Namespace) -> dict[str, Any]:
    """Choose each case's rate on seed 0, then run the other seeds at it; `args.jobs` runs at a time."""
    grids = {name: tuple(args.rates) if args.rates else case.rates for name, case in cases.items()}
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(unit="run") as bar:

        def start(runs: list[tuple[str, float, int]]) -> dict[tuple[str, float, int], dict[str, Any]]:
            bar.reset(total=len(runs))

            def one(which: tuple[str, float, int]) -> dict[str, Any]:
                name, rate, seed = which
                summary = run(cases[name], rate, seed, args.steps)
                bar.write(f"{name}, rate {rate:g}, seed {seed}: {shown(summary['student_after'])}")
                bar.update()
                return summary

            return dict(zip(runs, pool.map(one, runs), strict=True))

        tried = start([(name, rate, 0) for name in cases for rate in grids[name]])
        found = {name: {rate: tried[name, rate, 0]["student_after"] for rate in grids[name]} for name in cases}
        best = {name: max(grid, key=lambda rate: grid[rate] or 0) for name, grid in found.items()}
        reported = start([(name, best[name], seed) for name in cases for seed in args.seeds])
    return {
        name: {"grid": found[name], "rate": best[name], "runs": [reported[name, best[name], s] for s in args.seeds]}
        for name in cases
    }


def finished(found: dict[str, Any]) -> list[dict[str, Any]]:
    """An objective's reported runs, without those that diverged."""
    return [summary for summary in found["runs"] if summary != DIVERGED]


def mean(found: dict[str, Any], key: str) -> float:
    """Over an objective's finished runs; NaN if there is none."""
    return statistics.fmean(values) if (values := [summary[key] for summary in finished(found)]) else float("nan")


def shown(value: float | None) -> str:
    """A number, or that there is none."""
    return "diverged" if value is None else f"{value:.3f}"


def as_table(found: dict[str, Any], args: argparse.Namespace, *, title: str) -> str:
    """Sorted by the share of the gap that was closed."""
    order = sorted(found, key=lambda name: -mean(found[name], "gap_closed"))
    first = next(summary for name in order for summary in finished(found[name]))
    lines = [
        title,
        "",
        f"{args.steps} steps of 64 rollouts; student {first['student_before']:.3f}, teacher {first['teacher']:.3f}. "
        f"Means over seeds {', '.join(map(str, args.seeds))} at the learning rate that was best on seed 0; {args.jobs} "
        f"runs at a time. `{' '.join(['python benchmarks/' + Path(sys.argv[0]).name, *sys.argv[1:]])}`",
        "",
        "| objective | gap closed | each seed | accuracy | best rate | loop seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name in order:
        each = ", ".join(shown(summary.get("gap_closed")) for summary in found[name]["runs"])
        lines.append(
            f"| {name} | {mean(found[name], 'gap_closed'):.3f} | {each} | {mean(found[name], 'student_after'):.3f} "
            f"| {found[name]['rate']:g} | {mean(found[name], 'seconds'):.1f} |"
        )
    lines += ["", "Accuracy on seed 0 at each rate that was tried:", "", "| objective | |", "|---|---|"]
    for name in order:
        tried = "; ".join(f"{rate:g}: {shown(accuracy)}" for rate, accuracy in found[name]["grid"].items())
        lines.append(f"| {name} | {tried} |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Accuracy against steps and against seconds of the training loop: means over the seeds, and their spread."""
    order = sorted(found, key=lambda name: -mean(found[name], "gap_closed"))
    runs = {name: tuple(run_of_summary(name, summary) for summary in finished(found[name])) for name in order}
    groups = [Group(name, several) for name, several in runs.items() if several]
    panels = [Panel("held-out accuracy, sampled at T = 1", "eval/accuracy", against=axis) for axis in AXES]
    draw(groups, panels=panels).savefig(path, dpi=130, pil_kwargs={"optimize": True})


def compare(
    cases: Mapping[str, Case],
    *,
    name: str,
    title: str,
    description: str | None,
    seeds: tuple[int, ...],
    more: Callable[[dict[str, Any], Mapping[str, Case], int, int], str] | None = None,
) -> None:
    """Parse the command line, measure, and write table, numbers and plot under `name`.

    `more` gets what was found, the cases, the first seed and the steps; what it returns ends the table.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", choices=list(cases), default=list(cases))
    parser.add_argument("--rates", type=float, nargs="+", help="one grid for all; each has its own by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread; they slow each other")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    found = measure({objective: cases[objective] for objective in args.objectives}, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")  # first, as `more` may take long
    table = as_table(found, args, title=title)
    table += "" if more is None else more(found, cases, args.seeds[0], args.steps)
    (args.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / f"{name}.md").write_text(table)
    plot(found, args.out / f"{name}.png")
    print(table)


if __name__ == "__main__":
    compare(
        OBJECTIVES,
        name="objectives",
        title="# Objectives on the embedded pair",
        description=__doc__,
        seeds=SEEDS,
    )
