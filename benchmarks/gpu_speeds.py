"""How fast a device is: its own rates, one update, and sampling."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from gpu_bars import APART, FLOOR, LONG, MATMUL_SHARE, NATIVE, OBJECTIVES, PACKED, SHORT, SYNC, ratio_name
from gpu_bench import Bench, Found
from gpu_cases import environment
from limited import Ended, Limit

BLOCK = 2 * 1536 * (1536 + 256) + 3 * 1536 * 8960  # parameters of a block that update_cost.py builds
PASSES = 10  # operations a parameter and token: both models' forward, a second one of the student, its backward
STEP_TOKENS = 64 * 1024


def matmul(bench: Bench, limit: Limit) -> Found:
    """The card's own rates."""
    ended = limit.run(bench.script("gpu_probe.py", "matmul"), env=environment(bench.device))
    if ended.problem:
        return Found(failed=[ended.problem])
    rates = json.loads(ended.out)
    shown = {"bf16 matmul, TFLOP/s": f"{rates['operations'] / 1e12:,.1f}", "size": rates["size"]}
    return Found([shown | {"copy, GB/s": f"{rates['bytes'] / 1e9:,.0f}"}], {"matmul rate": rates["operations"]})


def update(bench: Bench, limit: Limit) -> Found:
    """Time and memory of one update, as ratios to its bound and to the plain form."""
    found, layers = Found(), 28 if bench.on_gpu else 1
    words = ["--layers", layers, "--repeats", 3 if bench.on_gpu else 1, "--device", bench.device]
    words += [] if bench.on_gpu else ["--objectives", "bound", "oprd", "topk"]
    sizes = (SHORT, LONG) if bench.on_gpu else (64,)
    for tokens in sizes:
        out = bench.work / f"update_{tokens}"
        compiled = ["--compiled"] if bench.on_gpu and tokens == SHORT else []  # says whether `compile: true` pays here
        command = bench.script("update_cost.py", "--tokens", tokens, *words, *compiled, "--out", out)
        ended = limit.run(command, env=environment(bench.device))
        if ended.problem:
            found.failed.append(f"{tokens:,} tokens ({ended.problem})")
            continue
        rows = json.loads((out / "update_cost.json").read_text())
        cases = {(row["objective"], row["formulation"]): row for row in rows}
        add_ratios(found, cases, tokens)
        if tokens == sizes[-1]:
            found.figures["bound's rate"] = PASSES * layers * BLOCK * tokens / cases["bound", "ours"]["seconds"]
            found.figures["seconds of a token"] = cases["oprd", "ours"]["seconds"] / tokens
    return found


def add_ratios(found: Found, cases: Mapping[tuple[str, str], Mapping[str, float]], tokens: int) -> None:
    """Add an update's figures and rows. What did not fit has none."""
    bound = cases["bound", "ours"]
    for objective in [name for name in OBJECTIVES if (name, "ours") in cases]:
        ours, row = cases[objective, "ours"], {"tokens": f"{tokens:,}", "objective": OBJECTIVES[objective]}
        for what, key in (("time", "seconds"), ("Δpeak", "delta_peak_bytes")):
            for to, other in (("bound", bound), ("plain", cases.get((objective, "plain")))):
                ratio = ours[key] / other[key] if other else None
                row[f"{what} / {to}"] = "–" if ratio is None else f"{ratio:.2f}"
                if ratio is not None:
                    found.figures[ratio_name(objective, what, to, tokens)] = ratio
        fused = cases.get((objective, "compiled"))
        row["time compiled / not"] = f"{fused['seconds'] / ours['seconds']:.2f}" if fused else "–"
        if "waiting_bytes" in ours:
            floor = bound["delta_peak_bytes"] + ours["waiting_bytes"]
            found.figures[ratio_name(objective, "Δpeak", FLOOR, tokens)] = ours["delta_peak_bytes"] / floor
        found.rows.append(row | {"seconds": f"{ours['seconds']:.3f}", "bound, seconds": f"{bound['seconds']:.3f}"})


def packing(bench: Bench, limit: Limit) -> Found:
    """What packed rows save beside padded ones, and whether they give the same gradients."""
    words: list[object] = ["--rows", 4, "--layers", 1, "--repeats", 1, "--kinds", "short answers"]
    if bench.on_gpu:
        words = ["--rows", 64, "--layers", 8, "--budget", LONG, "--device", bench.device, "--dtype", "bf16"]
    ended = limit.run(bench.script("packed_rows.py", *words, "--out", bench.work), env=environment(bench.device))
    if ended.problem:
        return Found(failed=[ended.problem])
    rows = json.loads((bench.work / "packed_rows.json").read_text())
    ratios = [row["packed"] / row["best cut"] for row in rows]
    shown = [
        {"responses": row["lengths"], "time packed / padded": f"{ratio:.2f}", "gradients apart": f"{row['apart']:.1e}"}
        for row, ratio in zip(rows, ratios, strict=True)
    ]
    return Found(shown, {PACKED: max(ratios), APART: max(row["apart"] for row in rows)})


def rollout(bench: Bench, limit: Limit) -> Found:
    """Speed of sampling, and what vLLM's sync and proof take. On a GPU at Qwen2.5-1.5B's shape."""
    words = ["--batch", 4, "--new-tokens", 8, "--prompt-tokens", 8, "--repeats", 1]
    if bench.on_gpu:
        ended, folder = student(bench, limit)
        if ended.problem:
            return Found(failed=[f"random weights ({ended.problem})"])
        words = ["--batch", 64, "--new-tokens", STEP_TOKENS // 64, "--prompt-tokens", 128, "--repeats", 1]
        words += ["--dtype", "bf16", "--threads", 0, "--model", folder]
    engines = ["native"] + (["vllm"] if bench.on_gpu and bench.facts["vllm"] else [])
    found = Found(note="" if len(engines) > 1 or not bench.on_gpu else "vLLM is not installed.")
    for engine in engines:
        ended = limit.run(bench.script("rollout.py", "--engine", engine, *words), env=environment(bench.device))
        lines = [line for line in ended.out.splitlines() if line.startswith("{")]
        if ended.problem or not lines:
            found.failed.append(f"{engine} ({ended.problem or 'it measured nothing'})")
            continue
        row = json.loads(lines[-1])
        shown = {"engine": engine, "tokens/s": f"{row['speed']:,.0f}", "sampling, s": f"{row['sampling']:.2f}"}
        found.rows.append(shown | {"sync, s": f"{row['sync']:.3f}", "proof, s": f"{row['proof']:.3f}"})
        if engine == "native":
            found.figures[NATIVE] = row["speed"]
        else:
            found.figures |= {"beside sampling": row["sync"] + row["proof"], "sampling": row["sampling"]}
    return found


def student(bench: Bench, limit: Limit) -> tuple[Ended, Path]:
    """A folder with random weights at Qwen2.5-1.5B's shape, written once."""
    folder = bench.work / "Qwen2.5-1.5B_random"
    if (folder / "model.safetensors").exists():
        return Ended(None, "", 0.0), folder
    return limit.run(bench.script("random_models.py", "1.5b", folder), env=environment(bench.device)), folder


def combined(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures that need several parts; those of parts that did not run are left out."""
    found = {}
    if "matmul rate" in figures and "bound's rate" in figures:
        found[MATMUL_SHARE] = figures["bound's rate"] / figures["matmul rate"]
    if "beside sampling" in figures and "seconds of a token" in figures:
        beside = figures["beside sampling"]
        step = beside + figures["sampling"] + figures["seconds of a token"] * STEP_TOKENS
        found[SYNC] = beside / step
    return found
