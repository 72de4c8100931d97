"""The history of a run: evaluations, per-layer cosines and totals. Checkpoints hold it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from matplotlib.figure import Figure

WINDOW = 10  # steps over which lengths of responses are averaged
COSINE_MAP = "layers/cosine_by_position"
_KLS = (r"token/(\w+/)?kl", r"token/(\w+/)?support_kl")  # the first that a step has; a composite names its parts
_MOST_COLUMNS = 256  # of the heatmap; with more, every second step is dropped


@dataclass
class History:
    """The history of a run.

    Attributes:
        teacher_accuracy: measured once; None if it was not measured.
        teacher_accuracies: of several teachers, that of each on the prompts that it reads; `teacher_accuracy` is then
            that of all together.
        teacher_errors: the relative error of quantisation in each teacher layer's states, by teacher if there are
            several; empty without quantisation.
        teacher_benchmarks: its Avg@k by benchmark, measured once; empty if it was not measured.
        evaluations: `{"step": …, "seconds": …, "accuracy": … or None, "perplexity": … or None}`, in order. Where the
            student has answered benchmarks, also `benchmarks`, its results by name, and `avg_at_k`, the mean over them.
            With several teachers also `accuracy_by_teacher`.
        layers: the tapped student layers.
        cosines: for each step, the cosine of each tapped layer.
        max_logprob_gap: the largest gap between sampler and trainer at a token, in nats; None if never measured.
        skipped_steps: the number of optimizer steps without an update.
        not_finite_steps: those of them whose loss or gradient was not finite.
        first_responses: `[mean length, share that was cut, share of distinct 4-grams]` of the responses of each of the
            first steps. The last is missing if no response had four tokens.
        last_responses: the same of the latest steps; no step is in both.
        first_kls: the KL to the teacher on the student's own responses, in each of the first steps where it was known.
        last_kls: the same of the latest steps; no step is in both.
        told: the kinds of remarks that the run has made.
        response_tokens: the number of response tokens in all steps so far.
        loop_seconds: time spent in training steps, without start-up, evaluation and checkpoints.
    """

    teacher_accuracy: float | None = None
    teacher_accuracies: dict[str, float] = field(default_factory=dict)
    teacher_errors: dict[Any, Any] = field(default_factory=dict)
    teacher_benchmarks: dict[str, float] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    cosines: dict[int, list[float]] = field(default_factory=dict)
    max_logprob_gap: float | None = None
    skipped_steps: int = 0
    not_finite_steps: int = 0
    first_responses: list[list[float]] = field(default_factory=list)
    last_responses: list[list[float]] = field(default_factory=list)
    first_kls: list[float] = field(default_factory=list)
    last_kls: list[float] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    response_tokens: int = 0
    loop_seconds: float = 0.0

    def add_cosines(self, step: int, metrics: dict[str, float]) -> None:
        """Keep the `layers/cosine_*` of a step."""
        column = {int(n.rpartition("_")[2]): value for n, value in metrics.items() if n.startswith("layers/cosine_")}
        if column:
            self.layers = sorted(column)
            self.cosines[step] = [column[layer] for layer in self.layers]
        if len(self.cosines) > _MOST_COLUMNS:
            self.cosines = {s: self.cosines[s] for s in list(self.cosines)[::2]}

    def add_logprob_gap(self, metrics: dict[str, float]) -> None:
        """Keep the `rollout/logprob_gap_max` of a step if it is the largest so far."""
        if (gap := metrics.get("rollout/logprob_gap_max")) is not None:
            self.max_logprob_gap = max(gap, self.max_logprob_gap or 0.0)

    def add_responses(self, metrics: dict[str, float]) -> None:
        """Keep the lengths of a step's responses, the share that was cut, and how much they repeat themselves."""
        names = ("rollout/response_tokens", "rollout/truncated_share", "rollout/distinct_4grams")
        found = [metrics[name] for name in names if name in metrics]
        if len(found) < 2:
            return
        if len(self.first_responses) < WINDOW:
            self.first_responses.append(found)
        else:
            self.last_responses = [*self.last_responses, found][-WINDOW:]

    def add_kl(self, metrics: dict[str, float]) -> None:
        """Keep the KL of a step, unless reference answers were read too."""
        kl = next((value for name in _KLS for key, value in metrics.items() if re.fullmatch(name, key)), None)
        if kl is None or not math.isfinite(kl) or metrics.get("rollout/reference_share"):
            return
        if len(self.first_kls) < WINDOW:
            self.first_kls.append(kl)
        else:
            self.last_kls = [*self.last_kls, kl][-WINDOW:]

    @property
    def measured(self) -> tuple[str | None, list[dict[str, Any]]]:
        """What tells good students from bad ones, and the evaluations that have it.

        It is the first of accuracy, the mean Avg@k over benchmarks, and perplexity that was measured.
        """
        for name in ("accuracy", "avg_at_k", "perplexity"):
            if rows := [e for e in self.evaluations if e.get(name) is not None]:
                return name, rows
        return None, []

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the highest accuracy or Avg@k, or with the lowest perplexity; see `measured`."""
        name, rows = self.measured
        if name == "perplexity":
            return min(rows, key=lambda e: e["perplexity"])
        return max(rows, key=lambda e: e[name or ""], default=None)

    def gap_closed(self, accuracy: float | None) -> float | None:
        """(accuracy − student before) / (teacher − student before); None if that is not defined."""
        before = self.evaluations[0]["accuracy"] if self.evaluations else None
        if accuracy is None or before is None or self.teacher_accuracy is None or self.teacher_accuracy == before:
            return None
        return (accuracy - before) / (self.teacher_accuracy - before)

    def accuracy_figure(self) -> Figure:
        """Plot accuracy against steps, with lines for the student before training and for the teacher."""
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        points = [(e["step"], e["accuracy"]) for e in self.evaluations if e["accuracy"] is not None]
        axes.plot(*zip(*points, strict=True), marker="o", label="student")
        axes.axhline(points[0][1], color="grey", linestyle=":", label=f"student before: {points[0][1]:.3f}")
        if self.teacher_accuracy is not None:
            label = f"teacher: {self.teacher_accuracy:.3f}"
            axes.axhline(self.teacher_accuracy, color="black", linestyle="--", label=label)
        axes.set(xlabel="optimizer steps", ylabel="held-out accuracy, sampled at T = 1", ylim=(0, 1.03))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        return figure

    def cosine_figure(self) -> Figure:
        """Plot the cosine between student and teacher as a layer × step heatmap."""
        layers = self.layers
        figure = Figure(figsize=(6.4, 1.6 + 0.16 * len(layers)), layout="constrained")
        axes = figure.add_subplot()
        columns = [self.cosines[step] for step in sorted(self.cosines)]
        extent = (min(self.cosines) - 0.5, max(self.cosines) + 0.5, -0.5, len(layers) - 0.5)
        picture = list(zip(*columns, strict=True))
        image = axes.imshow(picture, origin="lower", aspect="auto", interpolation="nearest", extent=extent)
        axes.set(xlabel="optimizer steps", ylabel="student layer", yticks=range(len(layers)), yticklabels=layers)
        figure.colorbar(image, label="cosine to the teacher")
        return figure

    def map_figure(self, name: str, values: list[list[float]]) -> Figure:
        """Plot a map of `Metrics.add_map`: `layers/cosine_by_position` with its axes, any other plainly."""
        figure = Figure(figsize=(6.4, 1.6 + 0.16 * len(values)), layout="constrained")
        axes = figure.add_subplot()
        if name != COSINE_MAP:
            image = axes.imshow(values, origin="lower", aspect="auto", interpolation="nearest")
            figure.colorbar(image, label=name)
            return figure
        # In short responses a token covers several of the columns, of which only the first has a value.
        covered = [list(accumulate(row, _or_last)) for row in values]
        extent = (0, 1, -0.5, len(values) - 0.5)
        image = axes.imshow(covered, origin="lower", aspect="auto", interpolation="nearest", extent=extent)
        axes.set(xlabel="place in the response, from its start to its end", ylabel="student layer")
        axes.set(yticks=range(len(self.layers)), yticklabels=self.layers)
        figure.colorbar(image, label="cosine to the teacher")
        return figure

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return dict(self.__dict__)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the data of a checkpoint."""
        self.__dict__.update(state)


def _or_last(last: float, value: float) -> float:
    return last if math.isnan(value) else value
