"""Groups of runs side by side: as a table for the terminal, as Markdown, and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oprd_tune.compare.past_run import LAST, PastRun
from oprd_tune.compare.seed_groups import Group, Spread
from oprd_tune.compare.short_settings import ABSENT, differing_keys, shown_values

_ROWS = [
    ("accuracy_before", "accuracy before", "{:.3f}"),
    ("accuracy_after", "accuracy after", "{:.3f}"),
    ("accuracy_best", "accuracy, best", "{:.3f}"),
    ("accuracy_teacher", "accuracy, teacher", "{:.3f}"),
    ("gap_closed", "gap closed", "{:.1%}"),
    ("perplexity_before", "perplexity before", "{:.4g}"),
    ("perplexity_after", "perplexity after", "{:.4g}"),
    ("loss", "loss at the end", "{:.3g}"),
    ("kl", "KL at the end, nats/token", "{:.3g}"),
    ("response_tokens", "response length, tokens", "{:.4g}"),
    ("tokens_per_second", "response tokens/s", "{:,.0f}"),
    ("seconds", "seconds", "{:,.1f}"),
    ("peak_gib", "peak memory, GiB", "{:.2f}"),
    ("skipped_steps", "steps skipped", "{:g}"),
    ("steps", "steps", "{:g}"),
]
_BENCHMARKS = 5  # so many rows stand above those of benchmarks
NOTE = (
    "Of several seeds: the mean, with the smallest and the largest. Loss and KL are means over the last "
    f"{LAST} logged steps, the response length over all. Losses of different kinds are not comparable."
)
Table = list[list[str]]  # rows of cells; the first row is the header, the first column labels


def results(groups: Sequence[Group]) -> Table:
    """What each group reached and what it took, without the rows that no run measured."""
    values = [group.values() for group in groups]
    rows = [["", *(group.name for group in groups)]]
    if any(len(group.runs) > 1 for group in groups) or len({run.seed for g in groups for run in g.runs}) > 1:
        rows.append(["seed", *(", ".join(str(run.seed) for run in group.runs) for group in groups)])
    benchmarks = dict.fromkeys(name for group in groups for run in group.runs for name in run.benchmarks)
    own_rows = [
        (f"{name}_avg_at_k_{when}", f"{name}, Avg@k {when}", "{:.3f}")
        for name in benchmarks
        for when in ("before", "after", "teacher")
    ]
    for key, label, pattern in [*_ROWS[:_BENCHMARKS], *own_rows, *_ROWS[_BENCHMARKS:]]:
        row = [one.get(key) for one in values]
        if key == "skipped_steps" and not any(spread and spread.high for spread in row):
            continue
        if any(spread is not None for spread in row):
            counts = [len(group.runs) for group in groups]
            rows.append([label, *(_cell(s, pattern, n) for s, n in zip(row, counts, strict=True))])
    return rows


def differences(groups: Sequence[Group]) -> Table:
    """The keys of the config in which the groups differ; only the header if there is none. Seeds are left out."""
    settings = [group.settings for group in groups]
    rows = [["key", *(group.name for group in groups)]]
    for key in differing_keys(settings):
        rows.append([key, *shown_values([one.get(key, ABSENT) for one in settings])])
    return rows


def remarks(runs: Sequence[PastRun]) -> list[str]:
    """What has to be known about single runs, a sentence each: those that have not finished, and what runs said."""
    said = []
    for run in runs:
        if run.summary is None:
            planned = run.settings.get("max_steps")
            said.append(f"{run.name}: not finished, step {run.step} of {planned}; it still goes, or was stopped")
        said += [f"{run.name}: {remark}" for remark in run.remarks]
    return said


def for_terminal(table: Table, width: int) -> str:
    """A table in columns; as many of them side by side as fit into `width` characters."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    blocks, first = [], 1
    while first < len(widths):
        last = first + 1
        while last < len(widths) and widths[0] + sum(2 + w for w in widths[first : last + 1]) <= width:
            last += 1
        columns = (0, *range(first, last))
        lines = [
            "  ".join(row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in columns) for row in table
        ]
        blocks.append("\n".join(line.rstrip() for line in lines))
        first = last
    return "\n\n".join(blocks)


def as_markdown(groups: Sequence[Group], picture: str) -> str:
    """The page: picture, results, differences and remarks."""
    runs = [run for group in groups for run in group.runs]
    parts = ["# Runs compared", f"![curves of the runs]({picture})", _markdown(results(groups)), NOTE]
    if len(groups) > 1:
        parts += ["## Differences in their configs", _markdown(differences(groups))]
    if said := remarks(runs):
        parts += ["## Remarks", "\n".join(f"- {sentence}" for sentence in said)]
    parts += ["## Folders", "\n".join(f"- {run.name}: `{run.folder}`" for run in runs)]
    return "\n\n".join(parts) + "\n"


def as_data(groups: Sequence[Group]) -> dict[str, Any]:
    """The same as plain data. Accuracies are fractions, `mean`, `low` and `high` are over `count` runs."""
    settings = [group.settings for group in groups]
    return {
        "groups": [
            {
                "name": group.name,
                "values": {key: spread and vars(spread) for key, spread in group.values().items()},
                "runs": [_run_as_data(run) for run in group.runs],
            }
            for group in groups
        ],
        "differences": {
            key: {group.name: one.get(key) for group, one in zip(groups, settings, strict=True)}
            for key in differing_keys(settings)
        },
    }


def _run_as_data(run: PastRun) -> dict[str, Any]:
    facts = {"name": run.name, "folder": str(run.folder), "seed": run.seed, "finished": run.summary is not None}
    return facts | {"values": run.values(), "remarks": run.remarks}


def _cell(spread: Spread | None, pattern: str, runs: int) -> str:
    if spread is None:
        return ABSENT
    mean, low, high = (pattern.format(value) for value in (spread.mean, spread.low, spread.high))
    text = mean if low == high else f"{mean} ({low}–{high})"
    return text if spread.count == runs else f"{text}, n = {spread.count}"


def _markdown(table: Table) -> str:
    head, *rows = [f"| {' | '.join(cell.replace('|', '∣') for cell in row)} |" for row in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *rows])
