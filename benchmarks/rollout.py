"""Tokens per second of sampling: the native engine, vLLM in the same process, and torchtune's own `generate`.

    python benchmarks/rollout.py                                    the embedded model
    python benchmarks/rollout.py --model FOLDER --batch 8           a Hugging Face folder in Qwen2 layout
    python benchmarks/rollout.py --launches                         launches and waits of the native engine

All engines sample the same number of tokens from the same prompts of different lengths, stop tokens off, each in a
process of its own, in turn; the median of the repeats counts. vLLM is sent the weights before each repeat, and then
proves its responses on-policy; both are timed apart. Writes a table and a plot to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from calls import count_calls

RESULTS = Path(__file__).parent / "results"
ENGINES = ("native", "vllm", "torchtune")
LABELS = {"native": "native", "vllm": "vLLM, colocated", "torchtune": "torchtune `generate`"}
NO_STOP_TOKEN = -1


def load(folder: str | None, dtype: str) -> tuple[Any, Any]:
    """The model and its checkpointer."""
    import torch
    from torchtune.models.qwen2 import qwen2
    from torchtune.training import FullModelHFCheckpointer

    from oprd_tune.modeling.weights import load_decoder
    from oprd_tune.tiny import checkpointer, tiny_qwen2

    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if folder is None:
        files = checkpointer("student", "/tmp")
        return load_decoder(tiny_qwen2, files, dtype=torch_dtype, device=device), files
    shape = json.loads((Path(folder) / "config.json").read_text())

    def build() -> Any:
        return qwen2(
            vocab_size=shape["vocab_size"],
            num_layers=shape["num_hidden_layers"],
            num_heads=shape["num_attention_heads"],
            num_kv_heads=shape["num_key_value_heads"],
            embed_dim=shape["hidden_size"],
            intermediate_dim=shape["intermediate_size"],
            max_seq_len=2048,
            norm_eps=shape["rms_norm_eps"],
            rope_base=shape["rope_theta"],
            tie_word_embeddings=shape["tie_word_embeddings"],
        )

    files = FullModelHFCheckpointer(folder, ["model.safetensors"], "QWEN2", "/tmp")
    return load_decoder(build, files, dtype=torch_dtype, device=device), files


def make_engine(args: argparse.Namespace, model: Any, files: Any) -> Any:
    """One of ours; None for torchtune's function."""
    from oprd_tune.protocols import Policy
    from oprd_tune.ranks import Ranks
    from oprd_tune.rollout import NativeEngine, VLLMColocated
    from oprd_tune.types import SamplingRequest

    if args.engine == "torchtune":
        return None
    weight = model.tok_embeddings.weight
    policy = Policy(model, files, weight.dtype, len(weight), Ranks(device=weight.device), RESULTS)
    stops = [NO_STOP_TOKEN] if args.engine == "native" else []
    engine = NativeEngine() if args.engine == "native" else VLLMColocated()
    engine.start(policy, SamplingRequest(stops, 0, args.prompt_tokens, args.new_tokens))
    return engine


def sample_with_torchtune(model: Any, prompts: list[tuple[int, ...]], new_tokens: int) -> int:
    """Sample and return how many tokens that were."""
    import torch
    from torchtune.generation import generate
    from torchtune.modules.common_utils import local_kv_cache

    width = max(map(len, prompts))
    weight = model.tok_embeddings.weight
    tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=weight.device)
    cache = {"batch_size": len(prompts), "device": weight.device, "dtype": weight.dtype}
    with torch.no_grad(), local_kv_cache(model, **cache, decoder_max_seq_len=width + new_tokens):
        output, _ = generate(model, tokens, max_generated_tokens=new_tokens, pad_id=0, temperature=1.0)
    return (output.shape[1] - width) * len(prompts)


def make_prompts(model: Any, count: int, longest: int) -> Any:
    """Random prompts of different lengths."""
    import torch

    from oprd_tune.types import Prompts

    lengths = [longest - i % (longest // 2) for i in range(count)]
    prompts = [tuple(torch.randint(2, model.tok_embeddings.num_embeddings, (n,)).tolist()) for n in lengths]
    return Prompts(tuple(prompts), tuple(range(count)), (None,) * count)


def measure(args: argparse.Namespace) -> None:
    """One case, in this process: print the tokens per second of each repeat."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, files = load(args.model, args.dtype)
    model.eval()
    batch = make_prompts(model, args.batch[0], args.prompt_tokens)
    prompts = list(batch.tokens)
    engine = make_engine(args, model, files)
    repeats = []
    for repeat in range(args.repeats + 1):  # the first one warms up
        times = [time.perf_counter()]
        if engine is not None:
            engine.sync_weights(repeat)
        times.append(time.perf_counter())
        proof = 0.0
        if engine is not None:
            rollout = engine.generate(batch, stream=repeat)
            tokens = rollout.response_tokens
            proof = rollout.logprob_gap.seconds if rollout.logprob_gap else 0.0
        else:
            tokens = sample_with_torchtune(model, prompts, args.new_tokens)
        sampling = time.perf_counter() - times[1] - proof
        repeats.append({"speed": tokens / sampling, "sync": times[1] - times[0], "proof": proof, "sampling": sampling})
    print(json.dumps({key: statistics.median(row[key] for row in repeats[1:]) for key in repeats[0]}))
    if engine is not None:
        engine.close()


def report_launches(args: argparse.Namespace) -> None:
    """Calls and waits of one decoding step of the native engine, which gives each row a token, at each pace."""
    import torch

    from oprd_tune.rollout.native.pace import IMMEDIATE, CapturedStep, Pace
    from oprd_tune.rollout.native.sampler import Sampler
    from oprd_tune.types import SamplingRequest

    torch.set_num_threads(args.threads or torch.get_num_threads())
    model, _ = load(args.model, args.dtype)
    paces = {"rows leave at once (CPU)": IMMEDIATE, "fixed shapes": Pace(16, 0.5, steady=True)}
    if torch.cuda.is_available():
        paces["fixed shapes, captured (CUDA)"] = Pace(16, 0.5, steady=True, repeatable=CapturedStep)
    short, long = 33, 81  # the embedded model ends at 128
    rows = []
    for batch in args.batch:
        prompts = make_prompts(model, batch, args.prompt_tokens)
        for name, pace in paces.items():
            found = []
            for tokens in (short, short, long):  # the first one warms up
                request = SamplingRequest([NO_STOP_TOKEN], 0, args.prompt_tokens, tokens)
                sampler = Sampler(model, request, pace=pace)
                found.append(count_calls(partial(sampler.sample, prompts)))
            calls, waits = ((more - less) / (long - short) for less, more in zip(*found[1:], strict=True))
            rows.append({"batch": batch, "pace": name, "launches": calls, "waits": waits})
    args.out.mkdir(exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    what = "launches" if torch.cuda.is_available() else "operators, which a GPU would launch"
    lines = [
        f"# One decoding step of the native engine, {Path(args.model).name if args.model else 'tiny'}, on {device}",
        "",
        f"Mean of {long - short} steps; each gives every row a token. `python benchmarks/rollout.py --launches`",
        "",
        f"| batch | pace | {what} | waits for a result |",
        "|---|---|---|---|",
        *(f"| {row['batch']} | {row['pace']} | {row['launches']:.1f} | {row['waits']:.3g} |" for row in rows),
    ]
    path = args.out / "rollout_launches"
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print(path.with_suffix(".md").read_text())


def run_cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every batch size with every engine, each in a fresh process."""
    rows = []
    for batch in args.batch:
        row: dict[str, Any] = {"batch": batch}
        for engine in args.engines:
            words = ["--engine", engine, "--batch", str(batch), "--dtype", args.dtype, "--repeats", str(args.repeats)]
            words += ["--new-tokens", str(args.new_tokens), "--prompt-tokens", str(args.prompt_tokens)]
            words += ["--threads", str(args.threads)] + (["--model", args.model] if args.model else [])
            result = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
            row[engine] = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
            print(f"batch {batch}, {engine}: {row[engine]['speed']:,.0f} tokens/s", file=sys.stderr)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], engines: list[str]) -> list[str]:
    """Speeds side by side, as ratios to the native engine's, and what vLLM takes besides."""
    others = [engine for engine in engines if engine != "native"]
    head = ["batch", "native, tokens/s", *(f"{LABELS[engine]}, tokens/s (× native)" for engine in others)]
    if "vllm" in engines:
        head += ["vLLM: sync, s", "proof, s", "both, share of sync + rollout"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        native = row["native"]["speed"]
        cells = [str(row["batch"]), f"{native:,.0f}"]
        cells += [f"{row[engine]['speed']:,.0f} ({row[engine]['speed'] / native:.2f})" for engine in others]
        if "vllm" in engines:
            v = row["vllm"]
            besides = v["sync"] + v["proof"]
            cells += [f"{v['sync']:.3f}", f"{v['proof']:.3f}", f"{besides / (besides + v['sampling']):.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write the table and the plot."""
    from matplotlib.figure import Figure

    name = Path(args.model).name if args.model else "tiny"
    args.out.mkdir(exist_ok=True)
    words = " ".join("FOLDER" if word == args.model else word for word in sys.argv[1:])
    path = args.out / f"rollout_{name}_{args.dtype}_{args.new_tokens}_tokens"
    lines = [
        f"# Sampling, {name}, {args.dtype}",
        "",
        f"{args.new_tokens} new tokens after prompts of up to {args.prompt_tokens}; {args.threads or 'default'} "
        f"threads; median of {args.repeats}. `python benchmarks/rollout.py {words}`",
        "",
        *table(rows, args.engines),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for engine in args.engines:
        axes.plot([r["batch"] for r in rows], [r[engine]["speed"] for r in rows], marker="o", label=LABELS[engine])
    axes.set(
        xlabel="rows decoded together", ylabel="tokens/s", xscale="log", yscale="log", title=f"{name}, {args.dtype}"
    )
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(path.with_suffix(".md").read_text())


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder; the embedded student by default")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="0 for torch's default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=list(ENGINES), help="native among them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--launches", action="store_true", help="count launches instead of measuring time")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        measure(args)
    elif args.launches:
        report_launches(args)
    else:
        report(run_cases(args), args)


if __name__ == "__main__":
    main()
