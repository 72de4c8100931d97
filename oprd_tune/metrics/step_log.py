"""`metrics.jsonl`: the metrics of a run as lines of JSON in its folder. Reading them takes no logger's software."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from oprd_tune.errors import ConfigError

FILE = "metrics.jsonl"
_TOTALS = {"step", "seconds", "tokens"}  # in each line


class StepLog:
    """Appends one line for each logged step, and one for each evaluation.

        {"step": 20, "seconds": 3.1, "tokens": 5120, "loss/total": 0.25, …}

    `step` is the number of finished optimizer steps. `seconds` were spent in the training loop, and `tokens` are the
    response tokens, both since the start of the run. A value that is not finite is null. A line is in the file before
    the next step starts, so the file of a run that still goes can be read.

    Args:
        folder: the run's folder.
        first_step: the next step of the run. Lines of this step and later ones are removed: a crashed run has left
            them after its last checkpoint, and its resumption writes them again.
        evaluated: the steps of all evaluations that the run knows of. Lines of others are removed: a run that was
            killed after it had caught up on an evaluation will do so again. None stands for every step.
    """

    def __init__(self, folder: Path, *, first_step: int, evaluated: Collection[int] | None = None) -> None:
        self._path = folder / FILE

        def is_known(line: Mapping[str, Any]) -> bool:
            step = line["step"]
            return step < first_step and (evaluated is None or step in evaluated or not _is_evaluation(line))

        keep_lines(self._path, is_known)

    def add(self, step: int, metrics: Mapping[str, float], *, seconds: float, tokens: int) -> None:
        """Append a line."""
        values = {"step": step, "seconds": seconds, "tokens": tokens, **metrics}
        # Opened each time: nothing is left to close, however the run ends.
        with self._path.open("a") as file:
            file.write(json.dumps({name: _plain(value) for name, value in values.items()}) + "\n")


def keep_lines(path: Path, is_known: Callable[[Mapping[str, Any]], bool]) -> None:
    """Remove from a file the lines that a run does not know, and damaged ones."""
    if not path.exists():
        return
    kept = [text for text, line in _lines(path) if line is not None and is_known(line)]
    staged = path.with_name(f".{path.name}")
    staged.write_text("".join(kept), encoding="utf-8")
    os.replace(staged, path)


def read_log(folder: Path) -> list[dict[str, Any]] | None:
    """The lines of a run's `metrics.jsonl`, in order; None without that file. A run may be writing the last one.

    Raises:
        ConfigError: if a line before the last one is damaged.
    """
    if not (folder / FILE).exists():
        return None
    found = [line for _, line in _lines(folder / FILE)]
    if found and found[-1] is None:
        found.pop()
    lines = [line for line in found if line is not None]
    if len(lines) < len(found):
        raise ConfigError(f"{folder}: line {found.index(None) + 1} of {FILE} is damaged; remove that line")
    return lines


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each line's text with its content; the content is None if the line is damaged."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            whole = text.endswith("\n") and isinstance(line, dict) and line.keys() >= _TOTALS
            yield text, line if whole else None


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return all(name.startswith("eval/") for name in line if name not in _TOTALS)


def _plain(value: float) -> float | None:
    if isinstance(value, int):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None  # more digits than fp32 has
