"""The curves of several runs as one grid of panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from oprd_tune.compare.past_run import KL
from oprd_tune.compare.seed_groups import Group, Point

AXES = {"steps": "optimizer steps", "seconds": "seconds in the training loop"}
_WIDE = 20.0  # a curve whose values span more than this factor is drawn on a logarithmic axis
_OUTLIER = 2.0  # a step that took so many times what 98 % of the steps took leaves the picture
_FEW = 30  # points that are marked one by one
_COLUMNS = 4
_LINE_INCHES, _LETTER_INCHES, _ROW_INCHES = 0.6, 0.065, 0.17  # of a legend's entry
_ACCURACY, _PERPLEXITY, _SECONDS = "eval/accuracy", "eval/perplexity", "time/step"


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: stands above it.
        pattern: of the whole name of the metric that it shows.
        benchmark: the name of the benchmark whose answers it is about, if it is about one.
        against: a key of `AXES`; None takes the picture's.
    """

    title: str
    pattern: str
    benchmark: str | None = None
    against: str | None = None

    @property
    def teacher(self) -> str | None:
        """The key of the teacher's number; None if the panel shows nothing that a teacher has."""
        if self.benchmark is not None:
            return f"{self.benchmark}_avg_at_k_teacher"
        return "accuracy_teacher" if self.pattern == _ACCURACY else None


PANELS = [
    Panel("held-out accuracy", _ACCURACY),
    Panel("perplexity of reference answers", _PERPLEXITY),
    Panel("loss", "loss/total"),
    Panel("KL, student to teacher, nats/token", KL),
    Panel("response length, tokens", "rollout/response_tokens"),
    Panel("seconds per step", _SECONDS),
    Panel("peak memory, GiB", "memory/peak"),
]


def draw(groups: Sequence[Group], *, against: str = "steps", panels: Sequence[Panel] | None = None) -> Figure:
    """Draw a panel for each metric that some run has logged, and a colour for each group.

    Lines are means over the runs of a group, bands go from the smallest to the largest. Of long curves, neighbouring
    steps are averaged.

    Args:
        groups: the runs.
        against: `steps` or `seconds`.
        panels: what to show; None shows `PANELS` and a panel for each benchmark.
    """
    if panels is None:
        names = dict.fromkeys(name for group in groups for run in group.runs for name in run.benchmarks)
        panels = [PANELS[0], *(Panel(f"{name}, Avg@k", f"eval/{name}/avg_at_k", name) for name in names), *PANELS[1:]]
    shown = [(panel, [group.curve(panel.pattern) for group in groups]) for panel in panels]
    shown = [(panel, curves) for panel, curves in shown if any(curves)]
    columns = max(1, min(_COLUMNS if len(shown) > 6 else 3, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for (panel, curves), axes in zip(shown, grid, strict=False):
        for number, curve in enumerate(curves):
            _plot(axes, curve, panel.against or against, f"C{number}")
        axes.set_title(panel.title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        if panel.teacher is not None:
            _add_teachers(axes, groups, panel.teacher)
        _scale(axes, panel, [level for curve in curves for p in curve for level in (p.value.low, p.value.high)])
    for place, axes in enumerate(grid):
        if place >= len(shown):
            axes.set_axis_off()
        elif place + columns >= len(shown):
            axes.set_xlabel(AXES[shown[place][0].against or against], fontsize=9)
    _add_legend(figure, groups, grid[len(shown) :])
    return figure


def _plot(axes: Any, curve: Sequence[Point], against: str, colour: str) -> None:
    if not curve:
        return
    x = [point.step if against == "steps" else point.seconds for point in curve]
    style = {"marker": "o", "markersize": 3} if len(curve) <= _FEW else {}
    axes.plot(x, [point.value.mean for point in curve], color=colour, linewidth=1.5, **style)
    if any(point.value.count > 1 for point in curve):
        low, high = [point.value.low for point in curve], [point.value.high for point in curve]
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _add_teachers(axes: Any, groups: Sequence[Group], key: str) -> None:
    """A dashed line for the teacher: one in black if all groups have the same, else one a group."""
    measured = [group.values().get(key) for group in groups]
    levels = {f"C{number}": spread.mean for number, spread in enumerate(measured) if spread is not None}
    if len(set(levels.values())) == 1:
        levels = {"black": next(iter(levels.values()))}
    for colour, level in levels.items():
        axes.axhline(level, color=colour, linestyle="--", linewidth=1)


def _scale(axes: Any, panel: Panel, values: Sequence[float]) -> None:
    smallest, largest = min(values), max(values)
    if smallest > 0 and (panel.pattern == _PERPLEXITY or largest > _WIDE * smallest):
        axes.set_yscale("log")
        if largest < 10 * smallest:  # few powers of ten, or none, lie within: show numbers between them
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.teacher is not None:
        axes.set_ylim(0, 1.03)
    elif panel.pattern == _SECONDS and largest > _OUTLIER * (usual := sorted(values)[int(0.98 * (len(values) - 1))]):
        axes.set_ylim(0, 1.2 * usual)
    elif smallest >= 0:
        axes.set_ylim(0, 1.08 * largest or 1)


def _add_legend(figure: Any, groups: Sequence[Group], empty: Sequence[Any]) -> None:
    """Name the colours, in a place of the grid that no panel takes, or else below it."""
    from matplotlib.lines import Line2D

    lines = []
    for number, group in enumerate(groups):
        label = group.name if len(group.runs) == 1 else f"{group.name}  (n = {len(group.runs)})"
        lines.append(Line2D([], [], color=f"C{number}", linewidth=2, label=label))
    if any(spread for group in groups for key, spread in group.values().items() if key.endswith("_teacher")):
        lines.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label="teacher"))
    if empty:
        empty[0].legend(handles=lines, loc="center left", fontsize=9, frameon=False)
    else:
        wide = _LINE_INCHES + _LETTER_INCHES * max(len(line.get_label()) for line in lines)
        fitting = max(1, int(figure.get_figwidth() / wide))
        columns = min(_COLUMNS, len(lines), fitting)
        figure.set_figheight(figure.get_figheight() + _ROW_INCHES * math.ceil(len(lines) / columns))
        figure.legend(handles=lines, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
