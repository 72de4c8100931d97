"""Prompts per second from a file to a data set that is ready for training, through a chat template.

    python benchmarks/prompts.py --tokenizer FOLDER     a Hugging Face folder with a chat template
    python benchmarks/prompts.py                        the embedded tokenizer with a template of ChatML

The prompts are word problems that the program makes up, as texts and as chat messages with a system message; `--source`
names a file of your own instead. Each case runs in a process of its own; the median of the repeats counts. CPU seconds,
of all threads together, do not depend on what else the machine does. Writes a table to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CHATML = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
NAMES = ["Ada", "Bohdan", "Chioma", "Dirk", "Elif", "Farid", "Gwen", "Hana"]
THINGS = ["apples", "notebooks", "tickets", "marbles", "eggs", "stamps", "chairs", "bottles"]
SENTENCES = [
    "{name} buys {a} boxes with {b} {things} in each of them.",
    "On the next day, {name} gives {a} {things} to a friend and finds {b} more at home.",
    "Each of the {things} costs ${a}.50, and there is a discount of {b}% for anyone who buys more than {a} of them.",
    "Over the following {a} weeks, {name} needs about {b} {things} every week.",
]


def problem(rng: random.Random) -> str:
    """A word problem of two to four sentences and a question."""
    said = [rng.choice(SENTENCES) for _ in range(rng.randint(2, 4))]
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    text = " ".join(s.format(name=name, things=things, a=rng.randint(2, 60), b=rng.randint(2, 90)) for s in said)
    return f"{text} How many {things} does {name} have in the end?"


def write_rows(path: Path, count: int, kind: str) -> None:
    """Write made-up prompts as texts or as messages, a row a line."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            prompt: Any = problem(rng)
            if kind == "messages":
                system = {"role": "system", "content": "Reason step by step."}
                prompt = [system, {"role": "user", "content": prompt}]
            file.write(json.dumps({"prompt": prompt, "answer": rng.randint(1, 999)}) + "\n")


def write_embedded(folder: Path) -> None:
    """The embedded tokenizer with a template of ChatML."""
    from oprd_tune.tiny.model import write_tokenizer

    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(CHATML)


def measure(args: argparse.Namespace) -> None:
    """One case, in this process: print its seconds."""
    from oprd_tune.data import HuggingFaceTokenizer, prompt_dataset

    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name), Path(name) / "prompts.jsonl"
        if args.tokenizer is None:
            write_embedded(folder)
        if args.source is None:
            write_rows(file, args.count, args.kind)
        start = time.perf_counter()
        tokenizer = HuggingFaceTokenizer(args.tokenizer or str(folder))
        loading = time.perf_counter() - start
        seconds, cpu_seconds = [], []
        for _ in range(args.repeats):
            start, cpu_start = time.perf_counter(), time.process_time()
            data = prompt_dataset(
                tokenizer, source=args.source or str(file), prompt_column=args.prompt_column, first=args.count
            )
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
    tokens = sum(len(data[i][0]) for i in range(len(data)))
    found = {"prompts": len(data), "tokens": tokens, "loading": loading}
    medians = {"seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu_seconds)}
    print(json.dumps(found | medians))


def run_cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every kind of prompt with every number of threads, each in a fresh process."""
    rows = []
    for kind in ["source"] if args.source else ["text", "messages"]:
        for threads in args.threads:
            words = ["--kind", kind, "--count", str(args.count), "--repeats", str(args.repeats)]
            for name in ("tokenizer", "source", "prompt_column"):
                if value := getattr(args, name):
                    words += [f"--{name.replace('_', '-')}", value]
            environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
            command = [sys.executable, __file__, *words]
            result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            case = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
            rows.append({"kind": kind, "threads": threads, **case})
            print(f"{kind}, {threads} threads: {case['seconds']:.1f} s", file=sys.stderr)
    return rows


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write the table."""
    args.out.mkdir(exist_ok=True)
    named = {args.tokenizer: "FOLDER", args.source: "FILE"}
    words = "".join(f" {named.get(word, word)}" for word in sys.argv[1:])
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "datasets"))
    lines = [
        "# From a file of prompts to a data set",
        "",
        f"Tokenizer and chat template: {Path(args.tokenizer).name if args.tokenizer else 'embedded, ChatML'}. "
        f"Median of {args.repeats}. {os.cpu_count()} CPU cores, Python {platform.python_version()}, {versions}. "
        f"`python benchmarks/prompts.py{words}`",
        "",
        "| prompts | threads | number | tokens each | s | prompts/s | CPU s | prompts/CPU s | tokenizer loads, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["kind"], str(row["threads"]), f"{row['prompts']:,}", f"{row['tokens'] / row['prompts']:.0f}"]
        for name in ("seconds", "cpu_seconds"):
            cells += [f"{row[name]:.2f}", f"{row['prompts'] / row[name]:,.0f}"]
        cells.append(f"{row['loading']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    (args.out / "prompts.md").write_text("\n".join(lines) + "\n")
    (args.out / "prompts.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="a Hugging Face folder; the embedded tokenizer by default")
    parser.add_argument("--source", help="a file of your own instead of made-up prompts")
    parser.add_argument("--prompt-column", help="with --source")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        measure(args)
    else:
        report(run_cases(args), args)


if __name__ == "__main__":
    main()
