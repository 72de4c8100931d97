"""What the numbers of a run mean, in plain sentences. Numbers in, sentences out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from oprd_tune.metrics.history import WINDOW, History

_UNKNOWN_NOISE = 0.05  # of an accuracy whose number of graded answers is not known
_PERPLEXITY_MARGIN = 0.01  # the same texts are read each time, so only rounding has to be allowed for
_ENDLESS_SHARE = 0.9
_LABELS = {"avg_at_k": "Avg@k"}
_IN_A_ROW = 3  # evaluations; a student may get worse for a moment while its states begin to move
_REPETITIVE, _REPETITION_MARGIN = 0.7, 0.2
_STRAY_FACTOR, _AGREEMENT = 2.0, 0.8  # of perplexity, and of the KL
_LENGTH_FACTOR, _LENGTH_MARGIN = 2.0, 16  # below so many tokens a response is short, whatever the factor


def remarks(history: History, *, max_new_tokens: int, graded: int | None, ended: bool) -> dict[str, str]:
    """Everything worth saying about a run, by kind; empty if all is well.

    Args:
        history: the run.
        max_new_tokens: the length limit of a response.
        graded: the number of answers that an evaluation grades; None if not known.
        ended: whether to say also what only counts at the end. Before, a student is worse only if it was so in three
            evaluations in a row, and lengths are judged from ten steps on.
    """
    lengths = [[row[0] for row in window] for window in (history.first_responses, history.last_responses)]
    distinct = [[row[2] for row in window if row[2:]] for window in (history.first_responses, history.last_responses)]
    latest = [*history.first_responses, *history.last_responses][-WINDOW:]
    truncated = [row[1] for row in latest] if ended or len(latest) == WINDOW else []
    (name, rows), best = history.measured, history.best
    if name == "avg_at_k":  # answers to one problem are alike, so each problem counts once
        graded = sum(one["problems"] for one in rows[0]["benchmarks"].values())
    lasts = name and len(rows) > _IN_A_ROW and all(_is_worse(name, rows[0], row, graded) for row in rows[-_IN_A_ROW:])
    kls = history.first_kls, history.last_kls
    perplexities = [row["perplexity"] for row in history.evaluations if row["perplexity"] is not None]
    found = {
        "astray": gone_astray(perplexities, *kls),
        "worse": worse_than_before(name, rows, best, graded, learns=_came_nearer(*kls))
        if name and best and (ended or lasts)
        else None,
        "endless": never_ending(truncated, max_new_tokens),
        "skipped": skipped(history.not_finite_steps, history.skipped_steps - history.not_finite_steps),
        "length": length_change(*lengths),
        "repeats": repetition(*distinct),
        "best": best_is_elsewhere(name, rows, best, graded) if name and best and ended else None,
    }
    return {kind: sentence for kind, sentence in found.items() if sentence is not None}


def failure(said: Mapping[str, str], *, steps: int, skipped_steps: int) -> str | None:
    """Why a run that went on to its end did not succeed; None if it did.

    Args:
        said: its `remarks`.
        steps: the number of optimizer steps.
        skipped_steps: how many of them changed nothing.
    """
    if steps and steps == skipped_steps:
        return f"the student has not changed: {said['skipped']}"
    return said.get("worse")


def falls(before: float, after: float, graded: int | None) -> bool:
    """Whether an accuracy is lower than before, beyond noise.

    The rule: it fell by more than two standard errors of the difference, 2·√(p(1−p)/n + q(1−q)/n), where n answers were
    graded each time. p and q are taken with one more right and one more wrong answer, so that 0 and 1 have noise too.
    Both evaluations answer the same prompts with the same noise, so the true error is smaller. Without n, by 0.05.
    """
    if graded is None:
        return before - after > _UNKNOWN_NOISE
    shares = [(accuracy * graded + 1) / (graded + 2) for accuracy in (before, after)]
    return before - after > 2 * math.sqrt(sum(p * (1 - p) for p in shares) / graded)


def worse_than_before(
    name: str, rows: Sequence[dict[str, Any]], best: dict[str, Any], graded: int | None, *, learns: bool = False
) -> str | None:
    """The last evaluation is worse than the first: in accuracy or Avg@k by `falls`, else in perplexity by over 1 %.

    `learns` says whether the student came nearer to the teacher on the prompts of the training.
    """
    if not _is_worse(name, rows[0], rows[-1], graded):
        return None
    label, before, after = _LABELS.get(name, name), rows[0][name], rows[-1][name]
    if best["step"] == rows[0]["step"]:
        what = f": the best was step {best['step']} ({label} {_shown(before)}, now {_shown(after)})"
    else:
        what = (
            f" ({label} {_shown(before)}, now {_shown(after)}); the best was step {best['step']} ({_shown(best[name])})"
        )
    advice = "lower optimizer.lr"
    if learns:
        advice = (
            "on the training's own prompts it does come nearer to the teacher, so see that eval_dataset asks the same "
            f"kind of prompts; if it does, {advice}"
        )
    return f"worse than at the start{what}; {advice}"


def gone_astray(perplexities: Sequence[float], first: Sequence[float], last: Sequence[float]) -> str | None:
    """The KL to the teacher fell by a fifth or more, and the perplexity of reference answers has doubled.

    `first` and `last` are KLs of the first and the latest steps, which must not overlap.
    """
    if len(perplexities) < 2 or perplexities[-1] < _STRAY_FACTOR * perplexities[0] or not _came_nearer(first, last):
        return None
    before, after = statistics.fmean(first), statistics.fmean(last)
    return (
        f"the student learns to say what nobody asked for: the KL on its own responses fell from {_shown(before)} to "
        f"{_shown(after)}, while the perplexity of reference answers rose from {_shown(perplexities[0])} to "
        f"{_shown(perplexities[-1])}; set reference_share, such as [1, 0], or add a loss on hidden states"
    )


def best_is_elsewhere(
    name: str, rows: Sequence[dict[str, Any]], best: dict[str, Any], graded: int | None
) -> str | None:
    """The last student is worse than the best trained one, beyond noise."""
    last = rows[-1]
    if best["step"] == 0 or not _is_worse(name, best, last, graded):
        return None
    return (
        f"the best student is in best/, not final/: step {best['step']} ({_LABELS.get(name, name)} "
        f"{_shown(best[name])}), against {_shown(last[name])} after step {last['step']}"
    )


def never_ending(truncated: Sequence[float], max_new_tokens: int) -> str | None:
    """At least 90 % of the latest responses were cut. `truncated` has the share of each of the latest steps."""
    share = statistics.fmean(truncated) if truncated else 0.0
    if share < _ENDLESS_SHARE:
        return None
    steps = "the last step" if len(truncated) == 1 else f"the last {len(truncated)} steps"
    return (
        f"responses never end: {share:.0%} reach max_new_tokens = {max_new_tokens} in {steps}; check EOS and the chat "
        "template, or raise max_new_tokens"
    )


def length_change(first: Sequence[float], last: Sequence[float]) -> str | None:
    """Responses have become twice as long, or half as long, and by 16 tokens or more: mean lengths of the first steps
    of a run and of its latest ones, which must not overlap."""
    if len(first) < WINDOW or len(last) < WINDOW:
        return None
    before, after = statistics.fmean(first), statistics.fmean(last)
    short, long = sorted((before, after))
    if long < _LENGTH_FACTOR * short or long - short < _LENGTH_MARGIN:
        return None
    return f"the student's responses {'grew' if after > before else 'shrank'} from {before:.0f} to {after:.0f} tokens"


def repetition(first: Sequence[float], last: Sequence[float]) -> str | None:
    """The share of distinct 4-grams fell by 0.2 or more, to less than 0.7: means of the first and the latest steps."""
    if len(first) < WINDOW or len(last) < WINDOW:
        return None
    before, after = statistics.fmean(first), statistics.fmean(last)
    if after >= _REPETITIVE or before - after < _REPETITION_MARGIN:
        return None
    return (
        f"responses repeat themselves: {after:.0%} of a response's 4-grams differ, {before:.0%} at the start; read "
        "rollout/samples, and lower optimizer.lr"
    )


def skipped(not_finite: int, empty: int) -> str | None:
    """Steps that changed nothing, because a loss or gradient was not finite or because no token was selected."""
    said = []
    if not_finite:
        said.append(f"{_steps(not_finite)} not finite and skipped; lower optimizer.lr, or set dtype=fp32")
    if empty:
        said.append(f"{_steps(empty)} skipped since no token was selected; see truncated_responses and positions")
    return "; ".join(said) or None


def _came_nearer(first: Sequence[float], last: Sequence[float]) -> bool:
    """Whether the KL to the teacher fell by a fifth or more; false where it is not known well enough."""
    if len(first) < WINDOW or len(last) < WINDOW:
        return False
    return statistics.fmean(last) <= _AGREEMENT * statistics.fmean(first)


def _is_worse(name: str, before: dict[str, Any], after: dict[str, Any], graded: int | None) -> bool:
    """Whether a later evaluation is worse in the measure `name`, beyond noise."""
    if name == "perplexity":
        return after[name] > (1 + _PERPLEXITY_MARGIN) * before[name]
    return falls(before[name], after[name], graded)


def _shown(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:,.4g}"


def _steps(count: int) -> str:
    return "1 step was" if count == 1 else f"{count} steps were"
