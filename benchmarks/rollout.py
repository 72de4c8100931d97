"""Tokens per second of sampling: the native engine against torchtune's own `generate`.

    python benchmarks/rollout.py                                    the embedded model
    python benchmarks/rollout.py --model FOLDER --batch 8           a Hugging Face folder in Qwen2 layout

Both engines sample the same number of tokens from the same prompts of different lengths, stop tokens off, each in a
process of its own, in turn; the median of the repeats counts. Writes a table and a plot to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ENGINES = ("native", "torchtune")
NO_STOP_TOKEN = -1


def load(folder: str | None, dtype: str) -> tuple[Any, int]:
    """The model and the size of its vocabulary."""
    import torch
    from torchtune.models.qwen2 import qwen2
    from torchtune.training import FullModelHFCheckpointer

    from oprd_tune.modeling.load import load_decoder
    from oprd_tune.tiny import checkpointer, tiny_qwen2

    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    if folder is None:
        model = load_decoder(tiny_qwen2, checkpointer("student", "/tmp"), dtype=torch_dtype, device=torch.device("cpu"))
        return model, model.tok_embeddings.num_embeddings
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

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = FullModelHFCheckpointer(folder, ["model.safetensors"], "QWEN2", "/tmp")
    return load_decoder(build, files, dtype=torch_dtype, device=device), shape["vocab_size"]


def sample_once(engine: str, model: Any, prompts: list[tuple[int, ...]], new_tokens: int) -> int:
    """Sample and return how many tokens that were."""
    import torch
    from torchtune.generation import generate
    from torchtune.modules.common_utils import local_kv_cache

    from oprd_tune.rollout import NativeEngine
    from oprd_tune.types import Prompts

    if engine == "native":
        native = NativeEngine(model, stop_tokens=[NO_STOP_TOKEN], pad_id=0, max_new_tokens=new_tokens)
        batch = Prompts(tuple(prompts), tuple(range(len(prompts))), (None,) * len(prompts))
        return native.generate(batch).response_tokens
    width = max(map(len, prompts))
    weight = model.tok_embeddings.weight
    tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=weight.device)
    cache = {"batch_size": len(prompts), "device": weight.device, "dtype": weight.dtype}
    with torch.no_grad(), local_kv_cache(model, **cache, decoder_max_seq_len=width + new_tokens):
        output, _ = generate(model, tokens, max_generated_tokens=new_tokens, pad_id=0, temperature=1.0)
    return (output.shape[1] - width) * len(prompts)


def measure(args: argparse.Namespace) -> None:
    """One case, in this process: print the tokens per second of each repeat."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, vocabulary = load(args.model, args.dtype)
    model.eval()
    lengths = [args.prompt_tokens - i % (args.prompt_tokens // 2) for i in range(args.batch[0])]
    prompts = [tuple(torch.randint(2, vocabulary, (n,)).tolist()) for n in lengths]
    sample_once(args.engine, model, prompts, min(args.new_tokens, 4))
    speeds = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        tokens = sample_once(args.engine, model, prompts, args.new_tokens)
        speeds.append(tokens / (time.perf_counter() - started))
    print(json.dumps(speeds))


def run_cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every batch size with both engines, each in a fresh process."""
    rows = []
    for batch in args.batch:
        row: dict[str, Any] = {"batch": batch}
        for engine in ENGINES:
            words = ["--engine", engine, "--batch", str(batch), "--dtype", args.dtype, "--repeats", str(args.repeats)]
            words += ["--new-tokens", str(args.new_tokens), "--prompt-tokens", str(args.prompt_tokens)]
            words += ["--threads", str(args.threads)] + (["--model", args.model] if args.model else [])
            result = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
            row[engine] = statistics.median(json.loads(result.stdout.splitlines()[-1]))
        rows.append(row)
        print(f"batch {batch}: {row['native'] / row['torchtune']:.2f} x", file=sys.stderr)
    return rows


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write the table and the plot."""
    from matplotlib.figure import Figure

    name = Path(args.model).name if args.model else "tiny"
    RESULTS.mkdir(exist_ok=True)
    words = " ".join("FOLDER" if word == args.model else word for word in sys.argv[1:])
    path = RESULTS / f"rollout_{name}_{args.dtype}_{args.new_tokens}_tokens"
    lines = [
        f"# Sampling, {name}, {args.dtype}",
        "",
        f"{args.new_tokens} new tokens after prompts of up to {args.prompt_tokens}; {args.threads or 'default'} "
        f"threads; median of {args.repeats}. `python benchmarks/rollout.py {words}`",
        "",
        "| batch | native / torchtune | native, tokens/s | torchtune `generate`, tokens/s |",
        "|---|---|---|---|",
        *(
            f"| {r['batch']} | {r['native'] / r['torchtune']:.2f} | {r['native']:,.0f} | {r['torchtune']:,.0f} |"
            for r in rows
        ),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for engine in ENGINES:
        axes.plot([r["batch"] for r in rows], [r[engine] for r in rows], marker="o", label=engine)
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
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        measure(args)
    else:
        report(run_cases(args), args)


if __name__ == "__main__":
    main()
