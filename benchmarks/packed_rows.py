"""What packed rows save: time and gradients of an update, beside rows that are padded as the best cut pads them.

    python benchmarks/packed_rows.py
    python benchmarks/packed_rows.py --device cuda --dtype bf16 --layers 28 --rows 64 --budget 16384

Forward and backward of a random student at the width of Qwen2.5-1.5B, without head, on rows of lengths that padding.py
draws. Gradients are compared after one update by each way: ‖difference‖ / ‖gradient‖. Writes packed_rows.json and .md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from padding import LENGTHS, as_rollout, drawn
from torch import Tensor
from update_cost import Case

from oprd_tune.modeling.taps import layer_taps
from oprd_tune.types import Rollout

RESULTS = Path(__file__).parent / "results"
KINDS = ("short answers", "worked solutions, cut at 1,024")
PADDED, PACKED = "best cut", "packed"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def on_device(lengths: Sequence[int], device: torch.device) -> Rollout:
    """Rows of these lengths on a device."""
    rollout = as_rollout(lengths)
    moved: dict[str, Any] = {k: v.to(device) for k, v in vars(rollout).items() if isinstance(v, Tensor)}
    return replace(rollout, **moved)


def update(case: Case, micro_batches: Sequence[Rollout]) -> float:
    """Forward and backward over all rows of a step; returns seconds."""
    for parameter in case.student.parameters():
        parameter.grad.zero_()
    if case.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for micro in micro_batches:
        real_BS = torch.arange(micro.tokens_BS.shape[1], device=case.device) < micro.lengths_B.unsqueeze(1)
        real_T = micro.states_at(real_BS.flatten().nonzero().squeeze(1))
        with layer_taps(case.student, [case.depth], lambda _, state, at=real_T: state.flatten(0, 1)[at].float().sum()):
            micro.read_by(case.student).backward()
    if case.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def gradients(case: Case) -> list[Tensor]:
    """The gradients of the student's blocks."""
    return [parameter.grad.double().cpu() for parameter in case.student.layers.parameters()]


def compare(case: Case, lengths: Sequence[int], budget: int, repeats: int) -> dict[str, float]:
    """The least seconds of each way, and how far their gradients are apart."""
    torch.manual_seed(0)
    rollout = on_device(lengths, case.device)
    cuts = {PADDED: rollout.split(budget), PACKED: rollout.split(budget, packed=True)}
    best: dict[str, float] = {}
    found: dict[str, list[Tensor]] = {}
    for number in range(repeats + 1):
        for name, micro_batches in cuts.items():
            seconds = update(case, micro_batches)
            if number == 0:  # the first is for the gradients alone
                found[name] = gradients(case)
            else:
                best[name] = min(seconds, best.get(name, seconds))
    pairs = list(zip(found[PACKED], found[PADDED], strict=True))
    apart = sum((one - other).square().sum() for one, other in pairs) / sum(g.square().sum() for _, g in pairs)
    return {**best, "apart": float(apart) ** 0.5}


def main() -> None:
    """Measure, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a microbatch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=LENGTHS, default=KINDS, metavar="RESPONSES")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    case = Case(args.layers, torch.device(args.device), DTYPES[args.dtype])
    rows: list[dict[str, Any]] = []
    for kind in args.kinds:
        lengths = drawn(kind, 1)[0][: args.rows]
        rows.append({"lengths": kind, "tokens": sum(lengths), **compare(case, lengths, args.budget, args.repeats)})
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "packed_rows.json").write_text(json.dumps(rows, indent=1) + "\n")
    repeated = "one run" if args.repeats == 1 else f"the least of {args.repeats}"
    words = "" if args.repeats == parser.get_default("repeats") else f" --repeats {args.repeats}"
    lines = [
        "# Packed rows",
        "",
        f"Forward and backward of {args.rows} rows in microbatches of {args.budget:,} tokens, {args.layers} layers of "
        f"Qwen2.5-1.5B's width, {args.dtype}, {args.device}; {repeated}. `python benchmarks/packed_rows.py{words}`",
        "",
        "| responses | tokens | time packed / best cut | packed, s | best cut, s | gradients apart |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, theirs = row[PACKED], row[PADDED]
        seconds = f"{ours / theirs:.2f} | {ours:.3g} | {theirs:.3g}"
        lines.append(f"| {row['lengths']} | {row['tokens']:,} | {seconds} | {row['apart']:.1e} |")
    (args.out / "packed_rows.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
