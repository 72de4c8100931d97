"""The result of a run: `summary.json`, a table, and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from oprd_tune.metrics.history import History

_GIB = 2**30


def summarise(history: History, **facts: Any) -> dict[str, Any]:
    """The content of `summary.json`, with further facts such as the seed.

    Accuracies are fractions. A value that was not measured is None.
    """
    first, last = (history.evaluations[0], history.evaluations[-1]) if history.evaluations else ({}, {})
    best = history.best or {}
    seconds = history.loop_seconds
    return {
        "teacher": history.teacher_accuracy,
        "student_before": first.get("accuracy"),
        "student_after": last.get("accuracy"),
        "student_best": best.get("accuracy"),
        "best_step": best.get("step"),
        "gap_closed": history.gap_closed(last.get("accuracy")),
        "by_teacher": _by_teacher(history, first, last),
        "perplexity_before": first.get("perplexity"),
        "perplexity_after": last.get("perplexity"),
        "seconds": seconds,
        "response_tokens": history.response_tokens,
        "tokens_per_second": history.response_tokens / seconds if seconds else None,
        "skipped_steps": history.skipped_steps,
        "max_logprob_gap": history.max_logprob_gap,
        "teacher_errors": history.teacher_errors or None,
        "benchmarks": _benchmarks(history),
        "evaluations": history.evaluations,
        **facts,
    }


def _by_teacher(history: History, first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any] | None:
    """For each of several teachers its own accuracy and the student's, before and after; None if there is one."""
    before, after = first.get("accuracy_by_teacher", {}), last.get("accuracy_by_teacher", {})
    return {
        name: {"before": before.get(name), "after": value, "teacher": history.teacher_accuracies.get(name)}
        for name, value in after.items()
    } or None


def _benchmarks(history: History) -> dict[str, Any] | None:
    """For each benchmark the last results, Avg@k before training, and the teacher's; None if there is none."""
    rows = [row["benchmarks"] for row in history.evaluations if "benchmarks" in row]
    return {
        name: {
            **last,
            "before": rows[0][name]["avg_at_k"]["value"] if name in rows[0] else None,
            "teacher": history.teacher_benchmarks.get(name),
        }
        for name, last in (rows[-1].items() if rows else ())
    } or None


def write_summary(folder: Path, summary: dict[str, Any], history: History) -> None:
    """Write `summary.json`, and `accuracy.png` if accuracy was measured."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if any(e["accuracy"] is not None for e in history.evaluations):
        history.accuracy_figure().savefig(folder / "accuracy.png", dpi=150)


def _rows_of(benchmarks: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """The rows of the benchmarks: Avg@k before, after with its interval, and the teacher's."""
    rows: list[tuple[str, Any, str]] = []
    for name, one in benchmarks.items():
        after = one["avg_at_k"]
        interval = f"{after['value']:.4f} ({after['low']:.4f} to {after['high']:.4f})"
        rows.append((f"{name}, Avg@{one['k']}, student before", one["before"], "{:.4f}"))
        rows.append((f"{name}, Avg@{one['k']}, student after", interval, "{}"))
        rows.append((f"{name}, Avg@{one['k']}, teacher", one["teacher"], "{:.4f}"))
    return rows


def as_table(summary: dict[str, Any]) -> str:
    """The summary as a table for the terminal, without the rows that were not measured."""
    rows = [
        ("accuracy, student before", summary["student_before"], "{:.4f}"),
        ("accuracy, student after", summary["student_after"], "{:.4f}"),
        ("accuracy, teacher", summary["teacher"], "{:.4f}"),
        ("share of the gap closed", summary["gap_closed"], "{:.1%}"),
        *(
            (f"for {name}, student {when}" if when != "teacher" else f"for {name}, its teacher", value, "{:.4f}")
            for name, one in (summary["by_teacher"] or {}).items()
            for when, value in one.items()
        ),
        *_rows_of(summary["benchmarks"] or {}),
        ("perplexity of reference answers, before", summary["perplexity_before"], "{:,.4g}"),
        ("perplexity of reference answers, after", summary["perplexity_after"], "{:,.4g}"),
        ("largest gap of sampler and trainer, nats", summary["max_logprob_gap"], "{:.2g}"),
        ("optimizer steps", summary["steps"], "{}"),
        ("seconds in the training loop", summary["seconds"], "{:.1f}"),
        ("response tokens per second", summary["tokens_per_second"], "{:,.0f}"),
        ("peak memory, GiB", summary["peak_memory_bytes"] / _GIB, "{:.2f}"),
    ]
    shown = [(label, pattern.format(value)) for label, value, pattern in rows if value is not None]
    wide = max(len(label) for label, _ in shown)
    return "\n".join(f"  {label:<{wide}}  {value:>10}" for label, value in shown)
