"""How much of an update is padding: rows in their order, rows by length, as `Rollout.split` cuts them, and packed.

    python benchmarks/padding.py

Lengths are drawn from log-normal distributions, 64 rows a step, the mean over 200 steps; nothing is trained. The cost
of an update counts each computed token once, and each microbatch as `STARTING` tokens. packed_rows.py measures time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from oprd_tune.packing import STARTING
from oprd_tune.types import Rollout

RESULTS = Path(__file__).parent / "results"
ROWS, STEPS, VOCABULARY = 64, 200, 1000
# Median and spread of the responses, where they are cut, and the tokens of a prompt.
LENGTHS = {
    "short answers": (180, 0.5, 512, 128),
    "worked solutions, cut at 1,024": (600, 0.6, 1024, 128),
    "long reasoning, cut at 16,384": (5000, 0.8, 16_384, 200),
}
Cut = Callable[[list[int], int], list[list[int]]]


def drawn(name: str, steps: int) -> list[list[int]]:
    """The lengths of the rows of some steps."""
    median, spread, most, prompt = LENGTHS[name]
    generator = torch.Generator().manual_seed(0)
    responses = torch.randn(steps, ROWS, generator=generator).mul(spread).exp().mul(median)
    lengths: list[list[int]] = responses.clamp(1, most).long().add(prompt).tolist()
    return lengths


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


def as_rollout(lengths: Sequence[int]) -> Rollout:
    """Rows of these lengths, of any tokens."""
    tokens_BS = torch.randint(0, VOCABULARY, (len(lengths), max(lengths)))
    places = torch.zeros(len(lengths), dtype=torch.long)
    return Rollout(tokens_BS, tokens_BS < 0, tokens_BS.float(), torch.tensor(lengths), places > 0, places, 0)


def padded(lengths: list[int], budget: int) -> list[list[int]]:
    """As a run cuts them for a model that cannot read packed rows."""
    return [micro.lengths_B.tolist() for micro in as_rollout(lengths).split(budget)]


def packed(lengths: list[int], budget: int) -> list[list[int]]:
    """As a run cuts them for all others."""
    return [micro.lengths_B.tolist() for micro in as_rollout(lengths).split(budget, packed=True)]


CUTS: dict[str, Cut] = {"in order": in_order, "by length": by_length, "best cut": padded, "packed": packed}


def measure(cut: str, micro_batches: Sequence[Sequence[int]]) -> dict[str, float]:
    """The share of padding, the number of microbatches and the cost, in tokens."""
    read = sum(map(sum, micro_batches))
    computed = read if cut == "packed" else sum(len(part) * max(part) for part in micro_batches)
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
    for name in LENGTHS:
        lengths = drawn(name, args.steps)
        for budget in args.budgets:
            for cut, function in CUTS.items():
                found = [measure(cut, function(step, budget)) for step in lengths]
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
