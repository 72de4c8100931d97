"""The outcome of an evaluation: numbers for each model and benchmark, a table, and a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.figure import Figure

from oprd_tune.evaluation.samples import Sample
from oprd_tune.evaluation.statistics import avg_at_k, best_at_k, bootstrap, pass_at

Outcome = dict[str, dict[str, dict[str, Any]]]  # by benchmark, then by model


def outcome_of(samples: Iterable[Sample]) -> Outcome:
    """What each model reached on each benchmark.

    The keys of one: `avg_at_k`, `best_at_k` and `pass_at` (by j, powers of two up to k), each a mean over problems with
    its interval `[low, high]`; `tokens`, the mean length of a response; `truncated`, the share of cut responses;
    `distinct`, the mean share of distinct 4-grams; `seconds` of sampling; `tokens_per_second`; `problems`; `k`; and
    `difference`, the paired difference of `avg_at_k` to the first model's, None for the first.
    """
    groups: dict[str, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        groups[sample.benchmark][sample.model].append(sample)
    found: Outcome = {}
    for benchmark, models in groups.items():
        verdicts = {name: _verdicts(own) for name, own in models.items()}
        first = next(iter(models))
        found[benchmark] = {name: _one(own, verdicts[name]) for name, own in models.items()}
        for name in list(models)[1:]:
            pairs = zip(avg_at_k(verdicts[name]), avg_at_k(verdicts[first]), strict=True)
            found[benchmark][name]["difference"] = asdict(bootstrap([a - b for a, b in pairs]))
    return found


def _verdicts(samples: Sequence[Sample]) -> list[list[bool]]:
    """The verdicts of each problem, in the order of problems."""
    by_problem: dict[int, list[bool]] = defaultdict(list)
    for sample in samples:
        by_problem[sample.problem].append(sample.right)
    return [by_problem[problem] for problem in sorted(by_problem)]


def _one(samples: Sequence[Sample], verdicts: list[list[bool]]) -> dict[str, Any]:
    k = len(verdicts[0])
    seconds, tokens = sum(s.seconds for s in samples), sum(s.tokens for s in samples)
    distinct = [s.distinct for s in samples if s.distinct is not None]
    powers = [2**i for i in range(k.bit_length()) if 2**i <= k]
    return {
        "problems": len(verdicts),
        "k": k,
        "avg_at_k": asdict(bootstrap(avg_at_k(verdicts))),
        "best_at_k": asdict(bootstrap(best_at_k(verdicts))),
        "pass_at": {str(j): asdict(bootstrap(pass_at(verdicts, j))) for j in powers},
        "tokens": tokens / len(samples),
        "truncated": sum(s.truncated for s in samples) / len(samples),
        "distinct": sum(distinct) / len(distinct) if distinct else None,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "difference": None,
    }


def flat(outcome: Outcome) -> dict[str, float]:
    """The main numbers by one name each: `<model>_avg_at_k`, and with several benchmarks `<benchmark>_<model>_…`."""
    found: dict[str, float] = {}
    for benchmark, models in outcome.items():
        for model, one in models.items():
            prefix = f"{benchmark}_{model}" if len(outcome) > 1 else model
            found |= {f"{prefix}_{key}": one[key]["value"] for key in ("avg_at_k", "best_at_k")}
            found |= {f"{prefix}_{key}": one[key] for key in ("tokens", "truncated")}
    return found


def as_markdown(outcome: Outcome) -> str:
    """A table for people, one row for each benchmark and model; it also reads well in a terminal."""
    header = [
        "benchmark",
        "model",
        "problems × k",
        "Avg@k",
        "Best@k",
        "difference",
        "tokens",
        "cut",
        "distinct",
        "tokens/s",
    ]
    rows = [header]
    for benchmark, models in outcome.items():
        for model, one in models.items():
            rows.append(
                [
                    benchmark,
                    model,
                    f"{one['problems']} × {one['k']}",
                    _with_interval(one["avg_at_k"]),
                    _with_interval(one["best_at_k"]),
                    "" if one["difference"] is None else _with_interval(one["difference"], sign="+"),
                    f"{one['tokens']:.1f}",
                    f"{one['truncated']:.1%}",
                    "" if one["distinct"] is None else f"{one['distinct']:.3f}",
                    "" if one["tokens_per_second"] is None else f"{one['tokens_per_second']:,.0f}",
                ]
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _with_interval(estimate: Mapping[str, float], sign: str = "") -> str:
    return f"{estimate['value']:{sign}.3f} ({estimate['low']:{sign}.3f} to {estimate['high']:{sign}.3f})"


def as_figure(outcome: Outcome) -> Figure:
    """Bars of Avg@k with their intervals, a group for each benchmark; a dot marks Best@k."""
    models = list(dict.fromkeys(model for own in outcome.values() for model in own))
    figure = Figure(figsize=(2.4 + 0.55 * len(models) * len(outcome), 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(models)
    for place, model in enumerate(models):
        bars = [(x, own[model]) for x, own in enumerate(outcome.values()) if model in own]
        at = [x + (place - (len(models) - 1) / 2) * width for x, _ in bars]
        means = [one["avg_at_k"]["value"] for _, one in bars]
        below = [one["avg_at_k"]["value"] - one["avg_at_k"]["low"] for _, one in bars]
        above = [one["avg_at_k"]["high"] - one["avg_at_k"]["value"] for _, one in bars]
        drawn = axes.bar(at, means, 0.9 * width, yerr=[below, above], capsize=3, label=model)
        axes.plot(at, [one["best_at_k"]["value"] for _, one in bars], "o", color=drawn[0].get_facecolor(), mec="black")
    k = next(iter(next(iter(outcome.values())).values()))["k"]
    axes.set(xticks=range(len(outcome)), xticklabels=list(outcome), ylim=(0, 1.03))
    axes.set(ylabel=f"Avg@{k} (bars, with 95 % intervals)\nBest@{k} (dots)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
