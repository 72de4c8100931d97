"""Prompts that several teachers read, each its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from oprd_tune.data.prompts import PromptDataset
from oprd_tune.errors import ConfigError
from oprd_tune.protocols import Tokenizer

_SHOWN = 10  # unknown values in a message


@dataclass(frozen=True)
class PromptsOfTeacher:
    """Which prompts one of several teachers reads, and in which tokens.

    Attributes:
        values: what the data set's `teacher_column` says of them.
        tokenizer: the teacher's own tokenizer; None if it reads the student's tokens.
    """

    values: tuple[str, ...]
    tokenizer: Tokenizer | None = None


class RoutedPrompts:
    """A data set in which each prompt is for one of several teachers.

    Args:
        rows: as for `PromptDataset`, with the column `teacher_column`.
        teacher_column: the column that says who reads a prompt.
        teachers: the teachers by name.
        options: the other arguments of `PromptDataset`.

    Attributes:
        parts: by teacher, its prompts; without those teachers that read none.
        dropped, counts, largest_token, longest_teacher_prompt: as of a `PromptDataset`, over all parts.

    Raises:
        ConfigError: if there is no such column or no teacher, if a value is for no teacher or for two, or as
            `PromptDataset`.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        teacher_column: str | None,
        teachers: Mapping[str, PromptsOfTeacher] | None,
        **options: Any,
    ) -> None:
        if teachers is None:
            raise ConfigError(
                f"dataset.teacher_column is {teacher_column!r}, which says who of several `teachers` reads a prompt, "
                "and there is one teacher; leave it out"
            )
        if teacher_column is None:
            raise ConfigError(
                "there are several `teachers`; give dataset.teacher_column, the column that says which of them reads a "
                "prompt"
            )
        rows = list(rows)
        values = [row.get(teacher_column) for row in rows]
        if None in values:
            raise ConfigError(
                f"row {values.index(None)}, counted from 0, has no {teacher_column}, so no teacher reads it; fill it "
                "in, or take such rows out"
            )
        indices = _grouped([str(value) for value in values], teacher_column, teachers)
        self.parts: dict[str, PromptDataset] = {}
        places = []
        for name, own in indices.items():
            try:
                part = PromptDataset(
                    [rows[i] for i in own], tokenizer, teacher_tokenizer=teachers[name].tokenizer, **options
                )
            except ConfigError as error:
                raise ConfigError(f"of the {len(own)} rows for {name}, counted by themselves: {error}") from error
            self.parts[name] = part
            places += [(own[i], name, place) for place, i in enumerate(part.kept)]
        self._places = [(name, place) for _, name, place in sorted(places)]
        parts = list(self.parts.values())
        self.dropped = sum(part.dropped for part in parts)
        self.counts = {key: sum(part.counts[key] for part in parts) for key in parts[0].counts}
        self.counts |= {f"for_{name}": len(part) for name, part in self.parts.items()}
        self.largest_token = max(part.largest_token for part in parts)
        self.longest_teacher_prompt = max(part.longest_teacher_prompt or 0 for part in parts) or None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[tuple[int, ...], str | None]:
        """Prompt tokens and reference answer."""
        name, place = self._places[index]
        return self.parts[name][place]

    def teacher_of(self, index: int) -> str:
        """The name of the teacher that reads a prompt."""
        return self._places[index][0]

    def teacher_prompt(self, index: int) -> tuple[int, ...] | None:
        """The prompt as its teacher reads it; None if every teacher reads the student's tokens."""
        if self.longest_teacher_prompt is None:
            return None
        name, place = self._places[index]
        own = self.parts[name].teacher_prompt(place)
        return self.parts[name][place][0] if own is None else own

    def answer_tokens(self, index: int) -> tuple[int, ...]:
        """The tokens of the reference answer, and EOS."""
        name, place = self._places[index]
        return self.parts[name].answer_tokens(place)

    def as_teacher_reads(self) -> PromptDataset:
        """Not of all prompts, because no teacher reads them all: ask one of the `parts`."""
        raise TypeError("several teachers read these prompts; ask one of the parts")

    @property
    def has_answers(self) -> bool:
        """Whether every prompt has a reference answer."""
        return all(part.has_answers for part in self.parts.values())


def _grouped(values: list[str], column: str, teachers: Mapping[str, PromptsOfTeacher]) -> dict[str, list[int]]:
    """By teacher, the indices of the rows that it reads."""
    reader: dict[str, str] = {}
    for name, own in teachers.items():
        for value in own.values:
            if value in reader:
                raise ConfigError(f"both teachers.{reader[value]} and teachers.{name} read the prompts {value!r}")
            reader[value] = name
    if unknown := sorted({*values} - {*reader}):
        raise ConfigError(
            f"no teacher reads the prompts whose {column!r} is {', '.join(map(repr, unknown[:_SHOWN]))}"
            f"{' …' if unknown[_SHOWN:] else ''}; list them as `prompts` of a teacher, or take such rows out. "
            f"Teachers read {', '.join(map(repr, reader))}"
        )
    found: dict[str, list[int]] = {name: [] for name in teachers}
    for i, value in enumerate(values):
        found[reader[value]].append(i)
    return {name: own for name, own in found.items() if own}
