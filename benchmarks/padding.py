"""How much of an update is padding: rows in their order, rows by length, and as `Rollout.split` cuts them.

    python benchmarks/padding.py

Lengths are drawn from log-normal distributions, 64 rows a step, the mean over 200 steps; nothing is trained. The cost
of an update counts each computed token once, and each microbatch as `STARTING` tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from oprd_tune.types import STARTING, Rollout

RESULTS = Path(__file__).parent / "results"
ROWS, STEPS = 64, 200
# Median and spread of the responses, where they are cut, and the tokens of a prompt.
LENGTHS = {
    "short answers": (180, 0.5, 512, 128),
    "worked solutions, cut at 1,024": (600, 0.6, 1024, 128),
    "long reasoning, cut at 16,384": (5000, 0.8, 16_384, 200),
}
Cut = Callable[[list[int], int], list[list[int]]]


def in_order(lengths: list[int], budget: int) -> list[list[int]]:
    """As many rows at a time as fit if all are as long as the longest."""
    rows = max(1, budget // max(lengths))
    return [lengths[i : i + rows] for i in range(0, len(lengths), rows)]


def by_length(lengths: list[int], budget: int) -> list[list[int]]:
    """The longest first, as many as fit."""
    rest, found = sorted(lengths, reverse=True), []
    while rest:
        rows = max(1, budget // rest[0])
        found.append(rest[:rows])
        rest = rest[rows:]
    return found


def ours(lengths: list[int], budget: int) -> list[list[int]]:
    """As a run does it."""
    column = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    places = torch.zeros(len(lengths), dtype=torch.long)
    rollout = Rollout(column, column > 0, column.float(), torch.tensor(lengths), places > 0, places, 0)
    return [micro.lengths_B.tolist() for micro in rollout.split(budget)]


CUTS: dict[str, Cut] = {"in order": in_order, "by length": by_length, "ours": ours}


def measure(micro_batches: Sequence[Sequence[int]]) -> dict[str, float]:
    """The share of padding, the number of microbatches and the cost, in tokens."""
    computed = sum(len(part) * max(part) for part in micro_batches)
    read = sum(map(sum, micro_batches))
    cost = computed + STARTING * len(micro_batches)
    return {"padding": 1 - read / computed, "microbatches": len(micro_batches), "cost": cost / read}


def main() -> None:
    """Draw, cut, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[16_384, 65_536])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, (median, spread, most, prompt) in LENGTHS.items():
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(args.steps, ROWS, generator=generator).mul(spread).exp().mul(median)
        lengths = drawn.clamp(1, most).long().add(prompt).tolist()
        for budget in args.budgets:
            for cut, function in CUTS.items():
                found = [measure(function(step, budget)) for step in lengths]
                means = {key: fmean(one[key] for one in found) for key in found[0]}
                rows.append({"lengths": name, "budget": budget, "cut": cut, **means})
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "padding.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "# Padding of microbatches",
        "",
        f"{ROWS} rows a step, the mean over {args.steps} steps; the cost is in tokens for each that is no padding. "
        "`python benchmarks/padding.py`",
        "",
        "| responses | `tokens_per_micro_batch` | rows | padding | microbatches | cost |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = f"{row['padding']:.1%} | {row['microbatches']:.1f} | {row['cost']:.2f}"
        lines.append(f"| {row['lengths']} | {row['budget']:,} | {row['cut']} | {cells} |")
    (args.out / "padding.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
