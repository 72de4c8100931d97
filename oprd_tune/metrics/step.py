"""The metrics of one step. Their sums stay on the device until the step is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from oprd_tune.ranks import Ranks
from oprd_tune.types import Rollout

_READ_FOR_REPETITION = 16  # responses of each rank


class Metrics:
    """Collects means, as sums and counts, single values, maps and notes. Collecting never waits for the device.

    Any name is allowed, such as `my/thing`. Ranks may add different names.

    Attributes:
        notes: what was noted on this rank, by name, in order.
    """

    def __init__(self) -> None:
        self.notes: dict[str, list[Any]] = {}
        self._maps: dict[str, tuple[Tensor, Tensor]] = {}
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | float] = {}
        self._values: dict[str, float] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to a mean: a sum, and the number of its terms."""
        total = total.detach().to(torch.float64) if isinstance(total, Tensor) else total
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts[name] + count if name in self._counts else count

    def add_each(self, name: str, value_T: Tensor) -> None:
        """Add one value for each token to a mean over tokens."""
        self.add(name, value_T.detach().sum(dtype=torch.float64), value_T.numel())

    def add_map(self, name: str, total: Tensor, count: Tensor) -> None:
        """Add to the means of a map, cell by cell: the sum in each cell, and the number of its terms, [rows, columns].

        A run draws it as a heatmap every `log_samples_every_n_steps` steps. Every rank adds the same maps.
        """
        before = self._maps.get(name)
        new = (total.detach().double(), count.detach().double())
        self._maps[name] = new if before is None else (before[0] + new[0], before[1] + new[1])

    def note(self, name: str, value: Any) -> None:
        """Keep anything that is no number in `notes`. Of these, a run logs `diagnostics/tokens`; others are yours."""
        self.notes.setdefault(name, []).append(value)

    def set(self, name: str, value: float) -> None:
        """Set a value that is not a mean. If ranks set different values, the lowest rank's counts."""
        self._values[name] = value

    def merge(self, other: Metrics, rename: Callable[[str], str] = str) -> None:
        """Add the sums and values of another collection, under the names that `rename` returns."""
        for name, total in other._sums.items():
            self.add(rename(name), total, other._counts[name])
        self._values |= {rename(name): value for name, value in other._values.items()}
        for name, (totals, counts) in other._maps.items():
            self.add_map(rename(name), totals, counts)
        for name, values in other.notes.items():
            self.notes.setdefault(rename(name), []).extend(values)

    def merge_means(self, other: Metrics, *, prefix: str) -> None:
        """Add the sums and values of another collection, but no maps and notes, under longer names."""
        for name, total in other._sums.items():
            self.add(prefix + name, total, other._counts[name])
        self._values |= {prefix + name: value for name, value in other._values.items()}

    def reduce(self, ranks: Ranks) -> dict[str, float]:
        """Means and values over all ranks, the same on each. All ranks must call. A mean of no terms is left out."""
        fetched = iter(_fetch([*self._sums.values(), *self._counts.values()]))
        sums = dict(zip(self._sums, fetched, strict=False))
        own = {name: (sums[name], count) for name, count in zip(self._counts, fetched, strict=True)}
        totals: dict[str, tuple[float, float]] = {}
        values: dict[str, float] = {}
        for sums_of_rank, values_of_rank in ranks.collect((own, self._values)):
            for name, (total, count) in sums_of_rank.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = before[0] + total, before[1] + count
            values = values_of_rank | values
        return {name: total / count for name, (total, count) in totals.items() if count} | values

    def reduce_maps(self, ranks: Ranks) -> dict[str, list[list[float]]]:
        """The maps over all ranks, the same on each; NaN in a cell of no terms. All ranks must call.

        Every rank has the same maps.
        """
        own = {name: (total.cpu(), count.cpu()) for name, (total, count) in self._maps.items()}
        everyone = ranks.collect(own)
        found = {}
        for name in own:
            total, count = (sum(of_rank[name][part] for of_rank in everyone) for part in (0, 1))
            found[name] = (total / count).tolist()  # type: ignore[union-attr]
        return found


def _fetch(values: Sequence[Tensor | float]) -> list[float]:
    """All values as numbers. It waits once for each device that holds values."""
    by_device: dict[torch.device, list[int]] = {}
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(place)
    fetched = list(values)
    for places in by_device.values():
        stacked = torch.stack([values[place].to(torch.float64) for place in places])  # type: ignore[union-attr]
        for place, value in zip(places, stacked.tolist(), strict=True):
            fetched[place] = value
    return fetched  # type: ignore[return-value]


@dataclass(frozen=True)
class StepResult:
    """What a training step returns. The loss is that of all ranks, or None if the step changed nothing."""

    loss: float | None
    rollout: Rollout
    metrics: Metrics = field(default_factory=Metrics)


def rollout_metrics(rollout: Rollout) -> Metrics:
    """The metrics that follow from a rollout alone: of what was sampled, and of given responses only their share."""
    metrics = Metrics()
    if rollout.given_B is not None:
        metrics.add("rollout/reference_share", rollout.given_B.sum(), len(rollout))
    if rollout.reading is not None:
        metrics.add("rollout/matched_share", rollout.matched_tokens, rollout.response_tokens)
    rollout = rollout.sampled
    rows, tokens = len(rollout), rollout.response_tokens
    metrics.add("rollout/response_tokens", rollout.response_mask_BS.sum(), rows)
    metrics.add("rollout/truncated_share", rollout.truncated_B.sum(), rows)
    metrics.add("rollout/entropy", -rollout.sampler_logprobs_BS.sum(), tokens)
    shares = [share for row in _responses(rollout, _READ_FOR_REPETITION) if (share := distinct_share(row)) is not None]
    metrics.add("rollout/distinct_4grams", sum(shares), len(shares))
    if (gap := rollout.logprob_gap) is not None:
        metrics.set("rollout/logprob_gap", gap.mean)
        metrics.set("rollout/logprob_gap_max", gap.largest)
        metrics.set("rollout/proof_seconds", gap.seconds)
    return metrics


def _responses(rollout: Rollout, count: int) -> list[list[int]]:
    """The tokens of the first responses."""
    rows = zip(rollout.tokens_BS[:count].tolist(), rollout.response_mask_BS[:count].tolist(), strict=True)
    return [[token for token, marked in zip(tokens, mask, strict=True) if marked] for tokens, mask in rows]


def distinct_share(tokens: Sequence[int], n: int = 4) -> float | None:
    """The share of a response's n-grams that differ from each other; 1 without repetition. None if it is too short."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def speed_metrics(seconds: dict[str, float], sampled: int, read: int) -> Metrics:
    """The times and speeds of a step.

    Args:
        seconds: this rank's time by phase.
        sampled: the number of response tokens, over all ranks.
        read: the number of prompt and response tokens, over all ranks.
    """
    metrics = Metrics()
    total = sum(seconds.values())
    for phase, value in {**seconds, "step": total}.items():
        metrics.set(f"time/{phase}", value)
    for phase, tokens in (("rollout", sampled), ("teacher", read), ("student", read)):
        if phase in seconds:
            metrics.set(f"speed/{phase}", tokens / seconds[phase])
    metrics.set("speed/step", sampled / total if total else 0.0)  # a step may have done nothing
    return metrics
