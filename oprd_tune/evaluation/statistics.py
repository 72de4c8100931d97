"""Estimates from several verdicts a problem, and how sure they are.

A problem has n verdicts, c of them right. k is the number of verdicts that every problem has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

Verdicts = Sequence[Sequence[bool]]  # by problem
RESAMPLES = 10_000
_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, and the interval that holds 95 % of its bootstrap means."""

    value: float
    low: float
    high: float


def avg_at_k(verdicts: Verdicts) -> list[float]:
    """The share of right verdicts, c / n, for each problem."""
    return [sum(own) / len(own) for own in verdicts]


def best_at_k(verdicts: Verdicts) -> list[float]:
    """1 for each problem with a right verdict, else 0."""
    return [float(any(own)) for own in verdicts]


def pass_at(verdicts: Verdicts, j: int) -> list[float]:
    """The chance that j of a problem's verdicts, drawn without replacement, hold a right one, for each problem.

    1 − C(n − c, j) / C(n, j), the unbiased estimator of Eq. 1 of https://arxiv.org/abs/2107.03374.

    Raises:
        ValueError: if a problem has fewer than j verdicts.
    """
    if j < 1 or any(len(own) < j for own in verdicts):
        raise ValueError(f"pass@{j} needs {j} verdicts of each problem")
    return [1 - comb(len(own) - sum(own), j) / comb(len(own), j) for own in verdicts]


def bootstrap(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of one value a problem, with a percentile interval over resampled problems.

    For a paired difference, give the difference of each problem.

    Raises:
        ValueError: if there are no values.
    """
    if not len(values):
        raise ValueError("a mean needs at least one value")
    means = _resampled_means(np.asarray(values, dtype=np.float64), seed, resamples)
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(float(np.mean(values)), float(low), float(high))


def _resampled_means(values_N: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // len(values_N))  # numbers drawn at once
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    drawn = (generator.integers(len(values_N), size=(size, len(values_N))) for size in sizes)
    return np.concatenate([values_N[index].mean(1) for index in drawn])
