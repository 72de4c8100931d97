"""What `rollout.ahead` hides: steps with and without it, with vLLM's servers on some cores and training on the others.

    python benchmarks/ahead.py

Two servers share the first half of this machine's cores, and the run has the second half, so neither slows the other.
Models have random weights. Sampling and training take turns without `rollout.ahead`; with it they overlap, and the time
saved is set against the shorter of the two, which is the most that can be saved. Runs alternate; medians of their steps
count. Writes a table to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from random_models import write_model

RESULTS = Path(__file__).parent / "results"
WARM_UP = 2  # steps that do not count
SHAPE: dict[str, Any] = {"vocab_size": 16, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 256, "max_seq_len": 1024}
SHAPE |= {"intermediate_dim": 768, "rope_base": 1e4, "norm_eps": 1e-6, "tie_word_embeddings": True}
BLOCKS = {"student": 4, "teacher": 12}
TRAINING = ("teacher", "student", "optimizer")


@contextmanager
def pinned(cores: list[int]) -> Iterator[None]:
    """Within the scope, new processes run on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def build(blocks: int) -> Any:
    """A builder of a model with so many blocks."""
    from torchtune.models.qwen2 import qwen2

    return partial(qwen2, num_layers=blocks, **SHAPE)


def serve(folder: Path, args: argparse.Namespace) -> list[Any]:
    """Two servers that start from the student."""
    from oprd_tune.rollout.vllm.server_process import ServerProcess

    arguments = ["--dtype", "float32", "--max-model-len", str(16 + args.new_tokens), "--generation-config", "vllm"]
    arguments += ["--skip-tokenizer-init", "--enable-scale-out", "--enforce-eager", "--kv-cache-memory-bytes"]
    environment = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    start = [*arguments, str(2**28)]
    return [ServerProcess(folder / "start", start, environment, folder / f"server_{i}.log") for i in range(2)]


def write_start(folder: Path) -> None:
    """The folder from which servers start: the student as it is sent to them."""
    import torch

    from oprd_tune.modeling import hugging_face_checkpointer
    from oprd_tune.modeling.weights import load_decoder
    from oprd_tune.protocols import Policy
    from oprd_tune.ranks import Ranks
    from oprd_tune.rollout.vllm.policy_weights import PolicyWeights
    from oprd_tune.rollout.vllm.weight_transfer import FolderTransfer

    files = hugging_face_checkpointer(str(folder / "student"), str(folder / "unused"))
    model = load_decoder(build(BLOCKS["student"]), files, dtype=torch.float32, device=torch.device("cpu"))
    policy = Policy(model, files, torch.float32, SHAPE["vocab_size"], Ranks(), folder)
    FolderTransfer(PolicyWeights(policy), folder).write_start()


def train(out: Path, ahead: int, addresses: list[str], cores: list[int], args: argparse.Namespace) -> list[Any]:
    """The metrics of those steps of a run that count."""
    folder = out.parent
    words = {
        **{"output_dir": out, "student": folder / "student", "teacher": folder / "teacher", "num_threads": len(cores)},
        **{"prompts_per_step": args.prompts, "max_new_tokens": args.new_tokens, "max_steps": WARM_UP + args.steps},
        **{"eval_dataset": "null", "task_accuracy": "null", "reference_perplexity": "null", "optimizer.lr": 1e-5},
        **{"rollout._component_": "oprd_tune.rollout.VLLMServer", "rollout.addresses": f"[{','.join(addresses)}]"},
        **{"rollout.ahead": ahead, "checkpoint_every_n_steps": 1000, "log_samples_every_n_steps": 1000},
        **{"layer_pairs": "[[1,3],[2,6],[3,9],[4,12]]"},
    }
    command = [sys.executable, "-m", "oprd_tune", "run", "oprd_distributed", "--config", "tiny/oprd"]
    command += [f"{key}={value}" for key, value in words.items()]
    with pinned(cores):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):  # 3: a student that is worse than before, which random teachers may make
        sys.exit(done.stderr[-2000:])
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "loss/total" in row and row["step"] > WARM_UP]


def median(rows: list[Any], *phases: str) -> float:
    """The median, over steps, of the seconds in these phases."""
    return statistics.median(sum(row.get(f"time/{phase}", 0.0) for phase in phases) for row in rows)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, list[Any]]:
    """The steps of all runs, without and with `ahead`."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    for seed, (name, blocks) in enumerate(BLOCKS.items()):
        write_model(folder / name, build(blocks), seed=seed)
    write_start(folder)
    steps: dict[str, list[Any]] = {"0": [], "1": []}
    with ExitStack() as scope:
        with pinned(cores[:half]):
            servers = [scope.enter_context(closing(server)) for server in serve(folder, args)]
        for server in servers:
            server.wait_until_ready(300)
        for repeat in range(args.repeats):
            for ahead, found in steps.items():
                own = train(folder / f"{repeat}_{ahead}", int(ahead), [s.address for s in servers], cores[half:], args)
                found += own
                print(f"run {repeat + 1}, ahead {ahead}: {median(own, 'step'):.2f} s a step", file=sys.stderr)
    return steps


def summary(steps: dict[str, list[Any]]) -> dict[str, float]:
    """Seconds of a step's parts without `ahead`, of a step with it, and the share of the shorter part that it hides."""
    before, after = steps["0"], steps["1"]
    found = {
        "sampling": median(before, "rollout"),
        "training": median(before, *TRAINING),
        "sync": median(before, "sync"),
    }
    found |= {"step": median(before, "step"), "step ahead": median(after, "step"), "wait": median(after, "wait")}
    return {**found, "hidden": (found["step"] - found["step ahead"]) / min(found["sampling"], found["training"])}


def main() -> None:
    """Parse the command line, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="of a step")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="of a run, beside those that warm up")
    parser.add_argument("--repeats", type=int, default=2, help="runs without and with `ahead`")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = summary(measure(Path(folder), args))
    lines = [
        "# `rollout.ahead`, two servers on half of the cores",
        "",
        f"{os.cpu_count()} cores; {args.prompts} prompts a step, up to {args.new_tokens} new tokens; seconds, medians "
        f"of {args.steps * args.repeats} steps. `python benchmarks/ahead.py`",
        "",
        "| sampling | training | sync | step | step with `ahead` | of that, waiting | of the shorter part, hidden |",
        "|---|---|---|---|---|---|---|",
        f"| {' | '.join(f'{found[key]:.2f}' for key in list(found)[:-1])} | {found['hidden']:.0%} |",
    ]
    args.out.mkdir(exist_ok=True)
    (args.out / "ahead.md").write_text("\n".join(lines) + "\n")
    (args.out / "ahead.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
