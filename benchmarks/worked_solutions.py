"""Real text: a language model whose teacher is itself with a worked solution, before and after a few steps.

    python benchmarks/worked_solutions.py      about fifteen minutes on two cores

Trains `smollm2_135m_self_distillation`, by tokens and by the last hidden states. Before and after, the student answers
problems that it has not trained on, and KL(student ‖ teacher) between its reading and the informed one is measured on
these answers. Model and problems come from the hub, unless --model names a folder and --prompts a file. Writes a table
to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from objectives import RESULTS, Case, launch
from self_distillation import prepared, read
from tqdm import tqdm

from oprd_tune.registry import recipe_files

CONFIG, MODEL, PROMPTS = "smollm2_135m_self_distillation", "HuggingFaceTB/SmolLM2-135M-Instruct", "openai/gsm8k"
QUIET = ("preflight=false", "evaluate_every_n_steps=1000", "log_samples_every_n_steps=1000", "device=cpu")
STATES = ("recipe=oprd_distributed", "loss._component_=oprd_tune.losses.HiddenStateMSE")
CASES = {
    "full KL": Case(CONFIG, (2e-5,)),
    "last hidden states": Case(CONFIG, (2e-5,), STATES, recipe_files()["oprd_distributed"]),
}


def words(args: argparse.Namespace) -> tuple[str, ...]:
    """Overrides of every run: where the model and the problems are."""
    found = [*QUIET, f"num_threads={args.threads}", f"student={args.model}"]
    for section in ("dataset", "eval_dataset"):
        found += [f"{section}.source={args.prompts}"]
        found += [f"~{section}.subset"] if Path(args.prompts).is_file() else []
    return tuple(found)


def held_out_kl(student: str | Path, folder: Path, args: argparse.Namespace) -> float:
    """KL(student ‖ informed first student) on the student's answers to held-out problems, in nats a token."""
    given = (*words(args), f"dataset.split=train[:{args.held_out}]", f"prompts_per_step={args.held_out}")
    recipe = prepared(Case(CONFIG, (), given), student, folder, first=args.model)
    recipe.engine.sync_weights(0)
    _, metrics = read(recipe, 0)
    return metrics["token/kl"]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """KL before training, and after each case at each of its rates."""
    with tempfile.TemporaryDirectory() as name:
        before = held_out_kl(args.model, Path(name), args)
    runs = []
    planned = [(name, rate) for name, case in CASES.items() for rate in case.rates]
    for objective, rate in tqdm(planned, unit="run"):
        with tempfile.TemporaryDirectory() as name:
            trained = Path(name) / "trained"
            if not launch(CASES[objective], rate, 0, args.steps, trained, list(words(args))):
                continue  # not finite
            rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
            losses = [row["loss/total"] for row in rows if "loss/total" in row]
            after = held_out_kl(trained / "final", Path(name), args)
        runs.append({"objective": objective, "rate": rate, "kl": after, "losses": losses})
    return {"before": before, "runs": runs}


def as_table(found: dict[str, Any], args: argparse.Namespace) -> str:
    """One row for each run."""
    lines = [
        f"# {Path(args.model).name} teaches itself with worked solutions",
        "",
        f"{args.steps} steps of 8 responses to problems of GSM8K. KL(student ‖ first weights with the solution) on the "
        f"student's answers to {args.held_out} held-out problems, in nats a token, is {found['before']:.3f} before "
        f"training. torch {version('torch')}, CPU. `python benchmarks/worked_solutions.py --held-out {args.held_out}`",
        "",
        "| objective | rate | KL on held-out problems | loss, first and last step |",
        "|---|---|---|---|",
    ]
    for run in found["runs"]:
        first, last = run["losses"][0], run["losses"][-1]
        lines.append(f"| {run['objective']} | {run['rate']:g} | {run['kl']:.3f} | {first:.3g}, {last:.3g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a folder or a hub name")
    parser.add_argument("--prompts", default=PROMPTS, help="a .jsonl file with question and answer, or a hub data set")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--held-out", type=int, default=64, help="problems whose answers are compared, at most 100")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    found = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "worked_solutions.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "worked_solutions.md").write_text(table := as_table(found, args))
    print(table)


if __name__ == "__main__":
    main()
