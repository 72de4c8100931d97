"""Runs of one setting: those that differ in nothing but their seed."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from oprd_tune.compare.past_run import PastRun

_MOST_POINTS = 40  # of a curve; of more, neighbouring steps are averaged


@dataclass(frozen=True)
class Spread:
    """The mean of `count` runs, the smallest and the largest of them."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Point:
    """A point of a group's curve, averaged over its runs that got that far."""

    step: float
    seconds: float
    value: Spread


@dataclass(frozen=True)
class Group:
    """Runs whose configs are equal but for the seed. `name` is what their names have in common."""

    name: str
    runs: tuple[PastRun, ...]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The config that the runs share, without the seed."""
        return _without_seed(self.runs[0])

    def values(self) -> dict[str, Spread | None]:
        """The numbers of the table, over those runs that measured them."""
        each = [run.values() for run in self.runs]
        keys = dict.fromkeys(key for one in each for key in one)
        return {key: spread([one.get(key) for one in each]) for key in keys}

    def curve(self, pattern: str) -> list[Point]:
        """The course of the first metric whose whole name matches."""
        curves = [run.curve(pattern) for run in self.runs]
        steps = sorted({step for curve in curves for step in curve})
        size = max(1, -(-len(steps) // _MOST_POINTS))
        points = []
        for start in range(0, len(steps), size):
            window = steps[start : start + size]
            each = [[(s, *curve[s]) for s in window if s in curve] for curve in curves]
            means = [tuple(map(statistics.fmean, zip(*found, strict=True))) for found in each if found]
            step, seconds, _ = map(statistics.fmean, zip(*means, strict=True))
            value = spread([mean[2] for mean in means])
            assert value is not None
            points.append(Point(step, seconds, value))
        return points


def group_by_seed(runs: Sequence[PastRun]) -> list[Group]:
    """Group runs in the order in which they are given."""
    members: dict[str, list[PastRun]] = {}
    for run in runs:
        members.setdefault(json.dumps(_without_seed(run), sort_keys=True, default=str), []).append(run)
    groups = list(members.values())
    names = [_common_name([run.name for run in group]) for group in groups]
    if len(set(names)) < len(names):
        names = [" + ".join(run.name for run in group) for group in groups]
    return [Group(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean, smallest and largest of the values that are there; None if there is none."""
    found = [value for value in values if value is not None]
    return Spread(statistics.fmean(found), min(found), max(found), len(found)) if found else None


def _without_seed(run: PastRun) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if key != "seed"}


def _common_name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in alike)
    common = re.sub(r"[\W_]+(seed|s)?[\W_]*\d*$|[\W_]*seed[\W_]*\d*$", "", common, flags=re.IGNORECASE)
    return common or f"{names[0]} … {names[-1]}"
