"""The pictures of docs/reading-a-run.md: a healthy run on the embedded pair, and three sick ones. About four minutes.

    python benchmarks/healthy_and_sick.py             writes docs/images/reading_curves.png and reading_heatmaps.png
    python benchmarks/healthy_and_sick.py --steps 4 --out FOLDER

It also prints what each run says of itself at its end.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.image import imread
from tqdm import tqdm

from oprd_tune.metrics.step_log import read_log
from oprd_tune.registry import config_files, recipe_files, recipe_named_in

IMAGES = Path(__file__).parent.parent / "docs" / "images"


@dataclass(frozen=True)
class Case:
    """A run: its config, what it changes, and its colour."""

    config: str
    colour: str
    overrides: tuple[str, ...] = ()


CASES = {
    "healthy": Case("tiny/oprd", "tab:green"),
    "rate too high": Case("tiny/oprd", "tab:red", ("optimizer.lr=0.1",)),
    "sampled KL, rate too high": Case("tiny/opd_sampled", "tab:orange", ("optimizer.lr=1e-2",)),
    "responses cut": Case("tiny/opd_topk", "tab:blue", ("max_new_tokens=2",)),
}
SHARED = (
    *("preflight=false", "lr_scheduler.warmup_steps=5", "eval_dataset.count=400", "evaluate_every_n_steps=10"),
    *("diagnostics_every_n_steps=1", "diagnostics_tokens=1000", "checkpoint_every_n_steps=1000"),
)
# Title, metric, scale of the axis.
CURVES = (
    ("accuracy of held-out answers", "eval/accuracy", "linear"),
    ("KL to the teacher, nats/token", "diagnostics/kl", "log"),
    ("the run's own loss, first step = 1", "loss/total", "symlog"),
    ("response length, tokens", "rollout/response_tokens", "linear"),
    ("share of responses that are cut", "rollout/truncated_share", "linear"),
    ("gradient norm before clipping", "optimizer/grad_norm", "log"),
)
HEATMAPS = {"layers/cosine": "by layer and step", "layers/cosine_by_position": "last step, by layer and position"}


def train(case: Case, folder: Path, steps: int) -> None:
    """One run, in a process of its own."""
    config = config_files()[case.config]
    words = [
        *SHARED,
        *case.overrides,
        f"output_dir={folder}",
        f"max_steps={steps}",
        f"log_samples_every_n_steps={steps}",
    ]
    command = [sys.executable, str(recipe_files()[str(recipe_named_in(config))]), "--config", str(config), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode not in (0, 3):  # 3: worse than before, as sick runs are
        sys.exit(done.stderr)


def curves(runs: Mapping[str, Path]) -> Figure:
    """A panel for each of `CURVES`, a line for each run."""
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    logs = {name: read_log(folder) or [] for name, folder in runs.items()}
    for axes, (title, metric, scale_of_axis) in zip(figure.subplots(2, 3).flat, CURVES, strict=True):
        for name, lines in logs.items():
            points = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
            steps, values = zip(*points, strict=True) if points else ((), ())
            scale = abs(values[0]) if metric == "loss/total" and values and values[0] else 1.0
            axes.plot(steps, [value / scale for value in values], color=CASES[name].colour, label=name, lw=1.5)
        axes.set_title(title, fontsize=9)
        axes.set_yscale(scale_of_axis)
        axes.grid(alpha=0.3)
    figure.supxlabel("optimizer steps", fontsize=9)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(runs), frameon=False
    )
    return figure


def heatmaps(runs: Mapping[str, Path]) -> Figure:
    """The heatmaps that TensorBoard shows of the first two runs, as it shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    shown = list(runs.items())[:2]
    grid = figure.subplots(len(HEATMAPS), len(shown), squeeze=False)
    for column, (name, folder) in enumerate(shown):
        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
        events.Reload()
        for row, (tag, title) in enumerate(HEATMAPS.items()):
            axes = grid[row][column]
            axes.imshow(imread(io.BytesIO(events.Images(tag)[-1].encoded_image_string)))
            axes.set_title(f"{name}: {title}", fontsize=9)
            axes.axis("off")
    return figure


def said(folder: Path) -> list[str]:
    """What a run says of itself at its end."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    share = summary.get("gap_closed") or math.nan
    return [f"{share:.1%} of the gap closed", *summary["remarks"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=IMAGES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder) / str(place) for place, name in enumerate(args.runs)}
        for name in tqdm(runs, unit="run"):
            train(CASES[name], runs[name], args.steps)
            tqdm.write(f"{name}: {'; '.join(said(runs[name]))}")
        args.out.mkdir(parents=True, exist_ok=True)
        curves(runs).savefig(args.out / "reading_curves.png", dpi=130)
        heatmaps(runs).savefig(args.out / "reading_heatmaps.png", dpi=150)


if __name__ == "__main__":
    main()
