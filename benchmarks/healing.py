"""A pruned language model is healed by the whole one, on a laptop: which objective does it, at which learning rate?

    python benchmarks/healing.py depth --jobs 2     SmolLM2-135M-Instruct without 6 of its 30 blocks
    python benchmarks/healing.py width --jobs 2     the same model with half of its channels and a third of its heads
    python benchmarks/healing.py answers --jobs 2 --steps 40 --seeds 0 --rates 3e-4
                                                    the latter, with and without reference answers at first

docs/healing.md says how long that takes. Model and prompts come from the hub, unless --model names a folder and
--prompts a file. `python -m oprd_tune prune` makes the student. Every objective runs at each learning rate of its grid
on the first seed, and at the best of them on the other seeds; each run is a process of its own, on one thread. What
counts is the perplexity of reference answers that no run has trained on. Student and finished runs are kept in --work,
so a command that was stopped goes on. Writes a table, the numbers and a picture to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from objectives import RESULTS, Case, launch
from tqdm import tqdm

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.folders import find_folder
from oprd_tune.registry import config_files, recipe_files

MODEL, PROMPTS = "HuggingFaceTB/SmolLM2-135M-Instruct", "openai/gsm8k"
CALIBRATION = "train[100:164]"  # rows that `prune` measures on; the first 100 are held out
PRECISION = {"dtype": "bf16", "master_dtype": "fp32", "device": "cpu", "num_threads": 1}
QUIET = ("evaluate_every_n_steps=5", "log_samples_every_n_steps=1000", "preflight=false")
DEPTH, WIDTH = "smollm2_135m_pruned", "smollm2_135m_narrow"
OPD, OPRD = (recipe_files()[f"{name}_distributed"] for name in ("opd_topk", "oprd"))
LOSS, FULL_KL = "loss._component_=oprd_tune.losses.", "oprd_tune.losses.FullReverseKL"
HELD = Path(__file__).parent / "held_near_start.py"
LAST = 5  # steps over which the KL at the end is averaged


@dataclass(frozen=True)
class Kind:
    """What is taken out of a model, and what heals it.

    Attributes:
        cut: options of `prune`.
        cases: the objectives.
        bridged: the case whose config fits the bridge of all; none if empty.
    """

    cut: str
    cases: dict[str, Case]
    bridged: str = ""


TOKENS = ("recipe=opd_topk_distributed", "~loss.normalisation")
COMPOSITE = (f"{LOSS}Composite", f"loss.parts.opd._component_={FULL_KL}", "loss.weights.opd=1")
STATES = ("loss.parts.oprd._component_=oprd_tune.losses.HiddenStateMSE", "loss.parts.oprd.normalisation=rms")
ANSWERS, FIRST = "reference_share=[1,0]", "answers first"  # all of them at first, none at last
NO_PARTS = ("~loss.parts", "~loss.weights")
KINDS = {
    "depth": Kind(
        "--drop-blocks 19,21,23,25,27,28",
        {
            "full KL": Case(DEPTH, (3e-4, 1e-3), (*TOKENS, f"loss._component_={FULL_KL}", "~layer_pairs"), OPD),
            "OPRD": Case(DEPTH, (3e-4, 1e-3)),
            "full KL + 30 OPRD": Case(DEPTH, (3e-4, 1e-3), (*TOKENS, *COMPOSITE, *STATES, "loss.weights.oprd=30"), OPD),
        },
    ),
    "width": Kind(
        "--width 288 --heads 3",
        {
            "full KL": Case(WIDTH, (1e-4, 3e-4), (f"loss._component_={FULL_KL}", *NO_PARTS, "~bridge")),
            "bridge": Case(
                WIDTH,
                (1e-4, 3e-4),
                (f"{LOSS}BridgedMSE", "loss.normalisation=l2", *NO_PARTS, "recipe=oprd_distributed"),
                OPRD,
            ),
            "full KL + 100 bridge": Case(WIDTH, (1e-4, 3e-4)),
            "full KL, held near its start": Case(WIDTH, (1e-4, 3e-4), recipe=HELD),
        },
        bridged="full KL + 100 bridge",
    ),
}
ALONE, BESIDE = (KINDS["width"].cases[name] for name in ("full KL", "full KL + 100 bridge"))
FORWARD = tuple(word.replace("FullReverseKL", "ForwardKL") for word in ALONE.overrides)
KINDS["answers"] = replace(
    KINDS["width"],
    cases={
        "full KL": ALONE,
        "forward KL": replace(ALONE, overrides=FORWARD),
        "forward KL, answers first": replace(ALONE, overrides=(*FORWARD, ANSWERS)),
        "full KL, answers first": replace(ALONE, overrides=(*ALONE.overrides, ANSWERS)),
        "full KL + 100 bridge": BESIDE,
        "full KL + 100 bridge, answers first": replace(BESIDE, overrides=(ANSWERS,)),
    },
)


def make_student(kind: Kind, args: argparse.Namespace) -> Path:
    """The folder of the pruned student. Fetches the model, and prunes it, if that has not been done."""
    from datasets import load_dataset

    student = args.work / f"{Path(args.model).name}{kind.cut.replace('--', '-').replace(' ', '_').replace(',', '_')}"
    if student.is_dir():
        return student
    try:
        find_folder("--model", args.model)
    except ConfigError:
        subprocess.run([sys.executable, "-m", "oprd_tune", "download", args.model], check=True)
    source = {"path": "json", "data_files": args.prompts} if is_file(args) else {"path": args.prompts, "name": "main"}
    args.work.mkdir(parents=True, exist_ok=True)
    texts = args.work / "calibration.jsonl"
    load_dataset(**source, split=CALIBRATION).to_json(texts)
    command = [sys.executable, "-m", "oprd_tune", "prune", args.model, str(student), *shlex.split(kind.cut)]
    command += ["--texts", str(texts), "--column", "question", "--answer-column", "answer", "--template", args.template]
    subprocess.run(command, check=True)
    return student


def is_file(args: argparse.Namespace) -> bool:
    """Whether the prompts are a local file."""
    return Path(args.prompts).is_file()


def overrides(case: Case, student: Path, args: argparse.Namespace) -> tuple[str, ...]:
    """A case's overrides, and what the command line adds to them."""
    words = [f"student={student}", f"teacher={args.model}", *(f"{key}={value}" for key, value in PRECISION.items())]
    words += [*QUIET, f"prompts_per_step={args.prompts_per_step}", f"max_new_tokens={args.tokens}"]
    words.append(f"reference_perplexity.first={args.answers}")
    if case.config == DEPTH and "~layer_pairs" not in case.overrides:
        kept = json.loads((student / "pruned.json").read_text())["blocks_kept"]
        words.append(f"layer_pairs={[[place, block] for place, block in enumerate(kept, 1)]}".replace(" ", ""))
    for section in ("dataset", "eval_dataset"):
        words += [f"{section}.source={args.prompts}", *([f"~{section}.subset"] if is_file(args) else [])]
        words += [f"{section}.prompt_template='{args.template}'"] if args.template != "chat" else []
    return (*case.overrides, *words, *args.overrides)


def key(case: Case, *settings: Any) -> str:
    """A name for what comes of a case with further settings."""
    words = [config_files()[case.config].read_text(), case, *settings]
    return sha256("\n".join(map(str, words)).encode()).hexdigest()[:16]


def run(case: Case, rate: float, seed: int, steps: int, words: list[str], kept: Path) -> dict[str, Any]:
    """One training run: its evaluations, and its losses at each step, also if it diverged. A finished one is kept."""
    done = kept / f"{key(case, rate, seed, steps, words)}.json"
    if done.is_file():
        return json.loads(done.read_text())
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name) / "run", time.perf_counter()
        finite = launch(case, rate, seed, steps, folder, words)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "eval/perplexity" in row]
    evaluations = [{"step": row["step"], "perplexity": row["eval/perplexity"]} for row in evaluated]
    parts = ("loss/total", "token/kl", "loss/bridge", "loss/oprd", "optimizer/grad_norm", "rollout/entropy")
    losses = {part: values for part in parts if (values := [row[part] for row in rows if part in row])}
    times = {"loop_seconds": rows[-1]["seconds"], "seconds": time.perf_counter() - start}
    found = {"rate": rate, "seed": seed, "finite": finite, "evaluations": evaluations, "steps": losses, **times}
    done.write_text(json.dumps(found))
    return found


def after(one: dict[str, Any]) -> float:
    """The perplexity at the end of a run; infinite if it diverged."""
    last = one["evaluations"][-1]["perplexity"]
    return last if one["finite"] and last is not None else math.inf


def at_best_rate(runs: list[dict[str, Any]], first_seed: int) -> list[dict[str, Any]]:
    """The runs at the rate that was best on the first seed."""
    best = min((one for one in runs if one["seed"] == first_seed), key=after)["rate"]
    return [one for one in runs if one["rate"] == best]


def measure(kind: Kind, args: argparse.Namespace) -> dict[str, Any]:
    """All runs, `args.jobs` at a time: each objective's grid on the first seed, then its best rate on the others."""
    student, first = make_student(kind, args), args.seeds[0]
    cases = {name: replace(case, overrides=overrides(case, student, args)) for name, case in kind.cases.items()}
    grids = {name: tuple(args.rates or cases[name].rates) for name in args.objectives or cases}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in grids}
    kept = args.work / "runs"
    kept.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(unit="run") as bar:
        bar.reset(total=sum(len(rates) + len(args.seeds) - 1 for rates in grids.values()))
        fitting = cases.get(kind.bridged)
        bridges = {seed: kept / f"{key(fitting, seed)}.safetensors" for seed in args.seeds} if fitting else {}

        def fit(seed: int) -> None:
            if fitting and not bridges[seed].is_file():
                bar.write(f"seed {seed}: a bridge is fitted")
                with tempfile.TemporaryDirectory() as folder:
                    launch(fitting, 0.0, seed, args.steps, Path(folder) / "run", ["bridge.fit_only=true"])
                    shutil.move(Path(folder) / "run" / "bridge.safetensors", bridges[seed])

        def one(name: str, rate: float, seed: int) -> dict[str, Any]:
            bridged = bool(bridges) and "~bridge" not in cases[name].overrides
            words = [f"bridge.file={bridges[seed]}"] if bridged else []
            done = run(cases[name], rate, seed, args.steps, words, kept)
            course = ", ".join(f"{e['step']}: {shown(e['perplexity'])}" for e in done["evaluations"])
            bar.write(f"{name}, rate {rate:g}, seed {seed}: perplexity {course}")
            bar.update()
            return done

        def teacher() -> dict[str, Any]:
            return run(cases["full KL"], 0.0, first, 1, [f"student={args.model}"], kept)

        whole = pool.submit(teacher)
        list(pool.map(fit, bridges))
        running: dict[Future[dict[str, Any]], str] = {
            pool.submit(one, name, rate, first): name for name, grid in grids.items() for rate in grid
        }
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                found[name].append(future.result())
                if len(found[name]) == len(grids[name]):
                    best = at_best_rate(found[name], first)[0]["rate"]
                    running |= {pool.submit(one, name, best, seed): name for seed in args.seeds[1:]}
    pruned = json.loads((student / "pruned.json").read_text())
    sizes = {key: pruned[key] for key in ("sizes_before", "sizes_after", "parameters_before", "parameters_after")}
    return {"teacher": whole.result()["evaluations"][0]["perplexity"], "pruned": sizes, "runs": found}


def shown(perplexity: float | None) -> str:
    """A perplexity in few digits."""
    if perplexity is None or math.isinf(perplexity):
        return "infinite"
    return f"{perplexity:.1e}" if perplexity >= 1e5 else f"{perplexity:,.{0 if perplexity >= 100 else 1}f}"


def as_table(found: dict[str, Any], facts: dict[str, Any]) -> str:
    """Every run; objectives are sorted by the worst end at their best rate."""
    runs, first = found["runs"], facts["seeds"][0]
    order = sorted(runs, key=lambda name: max(after(one) for one in at_best_rate(runs[name], first)))
    start = runs[order[0]][0]["evaluations"][0]["perplexity"]
    before, left = (found["pruned"][f"parameters_{when}"] / 1e6 for when in ("before", "after"))
    lines = [
        f"# {facts['model']}, pruned by `{facts['cut']}` and healed by the whole model",
        "",
        f"Of {before:,.3g} million parameters {left:,.3g} are left. {facts['steps']} steps of "
        f"{facts['prompts_per_step']} responses to prompts of {facts['prompts']}, of at most {facts['tokens']} tokens. "
        f"Perplexity of {facts['answers']} held-out reference answers: student at the start {shown(start)}, teacher "
        f"{shown(found['teacher'])}. `{facts['command']}`",
        "",
        f"| objective | rate | seed | perplexity | KL, first step | KL, last {LAST} steps |",
        "|---|---|---|---|---|---|",
    ]
    for name in order:
        best = at_best_rate(runs[name], first)
        for one in sorted(runs[name], key=lambda one: (one["seed"] != first, one["rate"])):
            end = ("**{}**" if one in best else "{}").format(shown(after(one)))
            kl = one["steps"].get("token/kl")
            kls = f"{kl[0]:.2f} | {statistics.fmean(kl[-LAST:]):.2f}" if kl else "– | –"
            kls = f"– | {kls.split(' | ')[1]}" if name.endswith(FIRST) else kls  # its first steps read answers
            lines.append(f"| {name} | {one['rate']:g} | {one['seed']} | {end} | {kls} |")
    lines += [
        "",
        "Bold: the best rate of an objective, the only one that other seeds were given. KL is that of student",
    ]
    lines += ["and teacher on the student's own responses, in nats a token."]
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], facts: dict[str, Any], path: Path) -> None:
    """Perplexity, and below it each run's own loss: a column for each objective, a colour for each rate."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    runs, first = found["runs"], facts["seeds"][0]
    rates = sorted({one["rate"] for name in runs for one in runs[name]})
    colours = {rate: colormaps["viridis"](0.75 * place / max(1, len(rates) - 1)) for place, rate in enumerate(rates)}
    figure = Figure(figsize=(3.6 * len(runs) + 1.5, 5.6), layout="constrained")
    rows = figure.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False, height_ratios=(5, 2))
    start = next(iter(runs.values()))[0]["evaluations"][0]["perplexity"]
    for (axes, below), name in zip(rows.T, runs, strict=True):
        for value, style, label in ((start, ":", "pruned"), (found["teacher"], "--", "teacher")):
            axes.axhline(value, color="black", linestyle=style, linewidth=1)
            axes.annotate(f"{label} {shown(value)}", (0, value), (3, 3), textcoords="offset points", fontsize=8)
        for one in runs[name]:
            style = {"color": colours[one["rate"]], "linestyle": "-" if one["seed"] == first else "--"}
            points = [(e["step"], e["perplexity"]) for e in one["evaluations"] if e["perplexity"] is not None]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)
            if after(one) > start:
                axes.plot(*points[-1], "X", color="red", markersize=9)
            if one["seed"] == first:
                axes.annotate(shown(points[-1][1]), points[-1], (7, -3), textcoords="offset points", fontsize=8)
            loss = one["steps"]["loss/total"]
            below.plot(range(1, len(loss) + 1), [value / loss[0] for value in loss], **style)
        axes.set(title=name, yscale="log", xlim=(0, facts["steps"] * 1.25))
        below.set(xlabel="optimizer steps")
        axes.grid(alpha=0.3)
        below.grid(alpha=0.3)
    rows[0, 0].set_ylabel("perplexity of held-out answers")
    rows[1, 0].set_ylim(bottom=0)
    rows[1, 0].set_ylabel("its own loss,\nfirst step = 1")
    handles = [rows[0, 0].plot([], [], color=colours[rate], label=f"rate {rate:g}")[0] for rate in rates]
    handles += rows[0, 0].plot([], [], "--", color="grey", label="another seed")
    handles += rows[0, 0].plot([], [], "X", color="red", label="worse than pruned")
    figure.legend(handles=handles, fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=130)


def facts_of(args: argparse.Namespace, kind: Kind) -> dict[str, Any]:
    """What the numbers depend on. Folders are not named."""
    names = ("seeds", "steps", "prompts_per_step", "tokens", "answers", "jobs", "overrides")
    places = {args.model, args.prompts, str(args.work), str(args.out), "--model", "--prompts", "--work", "--out"}
    words = ["python", f"benchmarks/{Path(__file__).name}", *(word for word in sys.argv[1:] if word not in places)]
    return {
        "command": shlex.join(words),
        "model": Path(args.model).name,
        "prompts": Path(args.prompts).parent.name if is_file(args) else args.prompts,
        "cut": kind.cut,
        **{name: getattr(args, name) for name in names},
        **PRECISION,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "torchtune", "transformers")},
        "cores": os.cpu_count(),
    }


def main() -> None:
    """Parse the command line, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every run's config")
    parser.add_argument("--model", default=MODEL, help="a folder or a hub name")
    parser.add_argument("--prompts", default=PROMPTS, help="a .jsonl file with question and answer, or a hub data set")
    parser.add_argument("--template", default="chat", help="a text around {prompt} instead of the chat template")
    parser.add_argument("--cut", help="other options of `prune`")
    parser.add_argument("--objectives", nargs="+")
    parser.add_argument("--rates", type=float, nargs="+", help="one grid for all; each has its own by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts-per-step", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of a response, at most")
    parser.add_argument("--answers", type=int, default=16, help="held-out answers whose perplexity is measured")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--work", type=Path, default=Path("outputs/healing"), help="where the pruned student is put")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_intermixed_args()
    kind = replace(KINDS[args.kind], cut=args.cut or KINDS[args.kind].cut)
    found = measure(kind, args)
    facts = facts_of(args, kind)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"healing_{args.kind}.json").write_text(json.dumps({"facts": facts, **found}, indent=1) + "\n")
    (args.out / f"healing_{args.kind}.md").write_text(table := as_table(found, facts))
    plot(found, facts, args.out / f"healing_{args.kind}.png")
    print(table)


if __name__ == "__main__":
    main()
