"""Proves on a GPU that everything works, and measures how fast it is: one command, one report, ten minutes.

    python benchmarks/gpu_check.py                                  all of it, on the first GPU
    python benchmarks/gpu_check.py --only recipes vllm              some parts
    python benchmarks/gpu_check.py --patience 2                     twice the time, for a slower machine

Nothing is downloaded: models are the embedded ones, or have random weights. Each part has a time limit; what fails, or
takes longer, is a row of the report, and the other parts go on. Without a GPU a small version runs on the CPU.

Writes gpu_check_<card>.md and .json to benchmarks/results/. The exit status is 1 where something failed, or where a bar
is missed on a card that the bars were set for (H100 class).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_bars import are_for
from gpu_bench import Bench, Found
from gpu_cases import environment
from gpu_flagship import flagship
from gpu_report import as_markdown, facts_rows, missed, verdict
from gpu_runs import recipes, resume, vllm
from gpu_speeds import combined, matmul, packing, rollout, update
from limited import STOP, Limit

RESULTS = Path(__file__).parent / "results"
PARTS: dict[str, tuple[Callable[[Bench, Limit], Found], float]] = {  # and their seconds on one GPU
    "recipes": (recipes, 150),
    "resume": (resume, 150),
    "vllm": (vllm, 150),
    "matmul": (matmul, 15),
    "update": (update, 210),
    "packing": (packing, 25),
    "rollout": (rollout, 90),
    "flagship": (flagship, 110),
}
TOGETHER = ("recipes", "resume", "vllm")  # they say nothing of speed, so on a GPU they run side by side: 600 s in all
CPU_PATIENCE = 3.0
SMALL = "This is the small version, on a CPU: it shows what runs. Its ratios say nothing of a GPU."


def run_part(name: str, bench: Bench, patience: float) -> Found:
    """A part. An error in it is what it has found."""
    function, seconds = PARTS[name]
    print(f"{name}: at most {seconds * patience:.0f} s", file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        found = function(bench, Limit(name, seconds * patience))
    except Exception as error:
        found = Found(failed=[f"{type(error).__name__}: {error}"])
    found.seconds = time.monotonic() - started
    found.failed = [reason.replace(str(bench.work), "…") for reason in found.failed]
    said = f"failed: {'; '.join(found.failed)}" if found.failed else "done"
    print(f"{name}: {said} ({found.seconds:.0f} s)", file=sys.stderr, flush=True)
    return found


def run_parts(names: Iterable[str], bench: Bench, patience: float) -> dict[str, Found]:
    """All parts: those that measure no speed first, on a GPU side by side; then the others, alone."""
    first = [name for name in names if name in TOGETHER]
    with ThreadPoolExecutor(len(TOGETHER) if bench.on_gpu else 1) as pool:
        try:
            found = dict(zip(first, pool.map(lambda name: run_part(name, bench, patience), first), strict=True))
        except KeyboardInterrupt:
            STOP.set()
            raise
    for name in names:
        if name not in first:
            found[name] = run_part(name, bench, patience)
    return found


def probe() -> dict[str, Any]:
    """What is here; see gpu_probe.py."""
    command = [sys.executable, str(Path(__file__).parent / "gpu_probe.py"), "facts"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment("cuda"))
    if found.returncode:
        sys.exit(f"the device cannot be asked:\n{found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def jobs_for(facts: dict[str, Any]) -> int:
    """Runs at a time: on a GPU two cores and three GiB each, else one core."""
    cores = facts["cores"] or 1
    return max(1, min(8, cores // 2, int(facts["free_gib"] // 3)) if "free_gib" in facts else min(8, cores))


def report(bench: Bench, parts: dict[str, Found], args: argparse.Namespace, seconds: float) -> int:
    """Write and print the report; returns the exit status."""
    figures = {name: value for found in parts.values() for name, value in found.figures.items()}
    figures |= combined(figures)
    failed = {name: found.failed for name, found in parts.items() if found.failed}
    enforced = args.enforce or are_for(bench.facts["card"])
    judged = bench.on_gpu or enforced
    below = missed(parts, figures) if judged else []
    said = verdict(failed, below, enforced) + ("" if judged else f"\n\n{SMALL}")
    facts = facts_rows(bench.facts, sys.argv[1:], seconds)
    path = args.out / f"gpu_check_{re.sub(r'[^0-9A-Za-z.]+', '_', bench.facts['card']).strip('_')}"
    args.out.mkdir(parents=True, exist_ok=True)
    text = as_markdown(parts, figures, facts, said, judged=judged).replace(str(bench.work), "…")
    path.with_name(f"{path.name}.md").write_text(text)
    record = {"facts": bench.facts, "enforced": enforced, "failed": failed, "missed": below, "figures": figures}
    record["parts"] = {name: vars(found) for name, found in parts.items()}
    path.with_name(f"{path.name}.json").write_text(json.dumps(record, indent=1).replace(str(bench.work), "…") + "\n")
    print(text)
    return int(bool(failed) or (enforced and bool(below)))


def main() -> int:
    """Parse the command line, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--enforce", action="store_true", help="a missed bar counts on any card")
    parser.add_argument("--jobs", type=int, help="runs of embedded models at a time; by default what fits")
    parser.add_argument("--patience", type=float, help="a factor on all time limits, for a slower machine")
    parser.add_argument("--full", action="store_true", help="without a GPU: all recipes and options that a CPU can do")
    parser.add_argument("--work", type=Path, help="a folder for runs and 20 GB of random weights; a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="of each run of embedded models")
    args = parser.parse_args()
    started, facts = time.monotonic(), probe()
    patience = args.patience or (1.0 if facts["device"] == "cuda" else CPU_PATIENCE)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        bench = Bench(facts, Path(work), args.jobs or jobs_for(facts), tuple(args.override), args.full)
        parts = run_parts(list(dict.fromkeys(args.only)), bench, patience)
        return report(bench, parts, args, time.monotonic() - started)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or what runs would go on
    sys.exit(main())
