"""The shipped config of the largest pair that fits one GPU, at full size, with random weights."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from typing import Any

from gpu_bars import MEMORY, OTHER_PHASES
from gpu_bench import FINISHED, Bench, Found
from gpu_cases import environment, logged
from gpu_speeds import student
from limited import Limit

from oprd_tune.registry import config_files

MAIN_PHASES = ("rollout", "teacher", "student", "optimizer")
NEEDS_GIB, NEEDS_DISK_GIB = 60, 24


def flagship(bench: Bench, limit: Limit) -> Found:
    """Three steps of `qwen2_5_7b_to_1_5b`: phases of a step, and predicted against measured memory."""
    words, problem = flagship_words(bench, limit)
    if problem:
        return Found(failed=[problem]) if words else Found(note=problem)
    out = bench.work / "flagship"
    config = config_files()["qwen2_5_7b_to_1_5b"]
    command = bench.script("timed_steps.py", "--config", config, *words, f"output_dir={out}")
    ended = limit.run(command, fine=FINISHED, env=environment(bench.device))
    if ended.problem:
        return Found(failed=[ended.problem])
    steps = logged(out)
    walls = json.loads(next(line for line in reversed(ended.out.splitlines()) if line.startswith("{")))["seconds"]
    predicted = re.search(r"^ *memory +([\d.]+) (GiB|MiB) a process", ended.out, re.MULTILINE)
    assert predicted is not None, "the run printed no table"
    gib = float(predicted[1]) / {"GiB": 1, "MiB": 1024}[predicted[2]]
    return phases(steps[1:], walls[1] - steps[1]["time/step"], gib)


def phases(steps: list[dict[str, Any]], outside: float, predicted_gib: float) -> Found:
    """The share of each phase in steps that are warm, and the prediction of memory.

    Args:
        steps: their metrics.
        outside: seconds of a step outside of all phases.
        predicted_gib: the preflight's peak.
    """
    names = [key for key in steps[-1] if key.startswith("time/") and key != "time/step"]
    seconds = {name.removeprefix("time/"): statistics.fmean(step.get(name, 0) for step in steps) for name in names}
    seconds["outside of all phases"] = max(0.0, outside)
    whole, measured = sum(seconds.values()), steps[-1]["memory/peak"]
    rows = [{"what": name, "seconds": f"{s:.3f}", "share": f"{s / whole:.1%}"} for name, s in seconds.items()]
    figures = {
        OTHER_PHASES: max(s for name, s in seconds.items() if name not in MAIN_PHASES) / whole,
        MEMORY: abs(predicted_gib / measured - 1),
    }
    speed = statistics.fmean(step["speed/rollout"] for step in steps)
    note = f"Memory: predicted {predicted_gib:.2f} GiB, measured {measured:.2f} GiB. Rollout: {speed:,.0f} tokens/s."
    return Found(rows, figures, note=note)


def flagship_words(bench: Bench, limit: Limit) -> tuple[list[str], str]:
    """The overrides of the flagship's run, and why it cannot run; no overrides if it should not."""
    prompts = bench.work / "prompts.jsonl"
    sums = [" ".join(f"{i + j}+{i}=" for j in range(14 if bench.on_gpu else 2)) for i in range(100, 400)]
    prompts.write_text("".join(json.dumps({"question": text, "answer": "0"}) + "\n" for text in sums))
    words = [f"dataset.source={prompts}", "dataset.subset=null", "dataset.prompt_template='{prompt}'"]
    words += ["max_steps=3", "eval_dataset=null", "task_accuracy=null", f"device={bench.device}"]
    words += ["rollout._component_=oprd_tune.rollout.NativeEngine", "rollout.batch_size=64"]
    words += ["bridge.prompts=16", "bridge.held_out_prompts=8"]
    if not bench.on_gpu:
        small = ["student=tiny/student", "teacher=tiny/wide_teacher", "max_prompt_tokens=32", "max_new_tokens=8"]
        return [*words, *small, "prompts_per_step=8", "bridge.rank=8", "num_threads=1"], ""
    if bench.facts["total_gib"] < NEEDS_GIB:
        return [], f"Left out: it takes {NEEDS_GIB} GiB of GPU memory."
    if shutil.disk_usage(bench.work).free < NEEDS_DISK_GIB * 2**30:
        return words, f"its weights take {NEEDS_DISK_GIB} GiB of disk: name a folder by --work"
    ended, folder = student(bench, limit)
    teacher = bench.work / "Qwen2.5-7B_random"
    if ended.problem is None:
        command = bench.script("random_models.py", "7b", teacher, "--seed", 1)
        ended = limit.run(command, env=environment(bench.device))
    words += [f"student={folder}", f"teacher={teacher}", "max_prompt_tokens=128", "max_new_tokens=512"]
    return words, f"random weights ({ended.problem})" if ended.problem else ""
