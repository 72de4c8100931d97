"""The samples of an evaluation: one line of JSON each, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One response to one problem, with its verdict.

    Attributes:
        model: the model's name in the evaluation.
        benchmark: the benchmark's name in the evaluation.
        problem: the problem's place in the benchmark, from 0.
        number: the number of this response among those to the problem, from 0.
        right: the grader's verdict.
        tokens: the length of the response, its stop token included.
        truncated: whether the response was cut at the most tokens.
        distinct: the share of its 4-grams that differ from each other; None if it is too short for one.
        seconds: this response's share of the time that its batch took to sample.
    """

    model: str
    benchmark: str
    problem: int
    number: int
    right: bool
    tokens: int
    truncated: bool
    distinct: float | None
    seconds: float
    prompt: str
    answer: str
    response: str


class SampleFile:
    """Appends samples to a file, and reads those that are there. Only one process may write.

    A line that a killed process has left unfinished is cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Sample]:
        """All samples, in the order in which they were written."""
        if not self._path.is_file():
            return []
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self._path.open("rb+") as file:
                file.truncate(len(whole))
        return [Sample(**json.loads(line)) for line in whole.decode().split("\n") if line]

    def append(self, samples: Iterable[Sample], **shared: Any) -> None:
        """Write samples at the end of the file. What they share, such as a step, stands first in each line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**shared, **asdict(sample)}, ensure_ascii=False) + "\n" for sample in samples)
