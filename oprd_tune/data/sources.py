"""Reads the columns of a local file or of a data set on the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oprd_tune.errors import ConfigError

Columns = Mapping[str, Sequence[Any]]
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


class WrittenNumber(float):
    """A number with a decimal point or an exponent that keeps the form in which a file wrote it, such as `1.50`."""

    def __new__(cls, text: str) -> WrittenNumber:
        """Make one from the file's text."""
        number = super().__new__(cls, text)
        number._text = text
        return number

    _text: str

    def __str__(self) -> str:
        return self._text


def read_columns(source: str, split: str, subset: str | None, revision: str | None = None) -> Columns:
    """The columns of a split by name.

    We read JSON and CSV ourselves. The `datasets` library, which reads the rest, would give a column one type, and so
    turn `1` into `1.0`, the text `007` into 7, and a date into a time. Here, numbers in JSON keep their written form,
    each field of a CSV file is text, and an empty one is None.

    Args:
        source: a hub name such as `openai/gsm8k`, or a path to a file that ends in one of `SUFFIXES`.
        split: a split of the hub's data set; a file has `train` alone. May be a slice such as `train[:2000]`.
        subset: the configuration of the hub's data set, such as `main`.
        revision: a commit, branch or tag of the hub's data set; None takes its newest commit.

    Raises:
        ConfigError: if the source cannot be read, or if a file is asked for a subset or a revision. It names the line
            of a file.
    """
    from datasets import load_dataset

    path = Path(source).expanduser()
    if path.suffix in SUFFIXES and not path.is_file():
        raise ConfigError(f"dataset.source: there is no file {path}")
    for name, value in (("subset", subset), ("revision", revision)):
        if value is not None and path.suffix in SUFFIXES:
            raise ConfigError(f"dataset.{name} {value!r} is for the hub, but {path} is a file; leave it out")
    try:
        if path.suffix in (".json", ".jsonl"):
            return _columns_of(_cut(_json_rows(path), split))
        if path.suffix == ".csv":
            return _columns_of(_cut(_csv_rows(path), split))
        if path.suffix == ".parquet":
            data = load_dataset("parquet", data_files=str(path), split=split)
        else:
            data = load_dataset(source, subset, split=split, revision=revision)
        return {name: data[name] for name in data.column_names}
    except ConfigError:
        raise
    except Exception as error:  # the library raises many kinds, most of them about the hub
        raise ConfigError(
            f"dataset.source {source!r} (split {split!r}) cannot be loaded: {error}. Give a hub name, or a file "
            f"ending in {', '.join(SUFFIXES)}"
        ) from error


def column(columns: Columns, name: str, *, source: str, first: int | None) -> list[Any]:
    """The first values of a column, or of a field within it: a dot leads into a struct, as in `reward_model.answer`.

    Raises:
        ConfigError: if there is no such column or field.
    """
    if name in columns:
        return list(columns[name][:first])
    root, *fields = name.split(".")
    if root not in columns or not fields:
        raise ConfigError(f"{source} has no column {name!r}; it has {', '.join(columns)}")
    values = list(columns[root][:first])
    for place, field in enumerate(fields):
        where = ".".join([root, *fields[:place]])
        if wrong := next((value for value in values if value is not None and not isinstance(value, Mapping)), None):
            raise ConfigError(
                f"{source} has no column {name!r}: {where} holds {type(wrong).__name__}, which has no fields"
            )
        known = dict.fromkeys(key for value in values if value is not None for key in value)
        if field not in known:
            raise ConfigError(f"{source} has no column {name!r}: {where} has no field {field!r}; it has {list(known)}")
        values = [None if value is None else value.get(field) for value in values]
    return values


def _columns_of(rows: Sequence[Mapping[str, Any]]) -> Columns:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _cut(rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    from datasets import ReadInstruction

    parts = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    return [row for part in parts for row in rows[part.from_ : part.to]]


def _json_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    # Only "\n" ends a line: a text in JSON may hold other characters that Python takes for the end of a line.
    whole = text.lstrip().startswith("[")
    lines = [(1, text)] if whole else [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows: list[Any] = []
    for number, line in lines:
        try:
            found = json.loads(line, parse_float=WrittenNumber)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path}, line {number + error.lineno - 1}: this is not JSON ({error.msg}, column {error.colno}); give "
                "one object a line, or one list of objects"
            ) from error
        rows += found if whole else [found]
        if wrong := next((row for row in rows[-1 if not whole else 0 :] if not isinstance(row, dict)), None):
            raise ConfigError(f"{path}, line {number}: {wrong!r} is no object; give one with a name for each column")
    return rows


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            header = next(lines, [])
            rows = []
            for fields in filter(None, lines):
                if len(fields) != len(header):
                    raise csv.Error(f"it has {len(fields)} fields, but the header has {len(header)}")
                rows.append(dict(zip(header, (field or None for field in fields), strict=True)))
        except csv.Error as error:
            raise ConfigError(f"{path}, line {lines.line_num} cannot be read: {error}") from error
    return rows
