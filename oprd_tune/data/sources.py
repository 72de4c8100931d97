"""Reads the columns of a local file or of a data set on the hub."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from oprd_tune.errors import ConfigError

Columns = Mapping[str, Sequence[Any]]
_PEEK = 2**16
_LONGEST_LINE = 64 * 2**20
_LARGEST_FILE = 8 * 2**30
_SHOWN = 200
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
            of a file. A file that is empty, too large or no text, and a line that is too long, are told as well.
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
    found = [row for part in parts for row in rows[part.from_ : part.to]]
    if rows and not found:
        raise ConfigError(f"dataset.split {split!r} is empty: the file has {len(rows)} rows")
    return found


def _json_rows(path: Path) -> list[dict[str, Any]]:
    _check_size(path)
    with open(path, "rb") as file:
        start = file.read(_PEEK).removeprefix(codecs.BOM_UTF8)
        file.seek(0)
        whole = start.lstrip().startswith(b"[")
        lines: Iterable[tuple[int, bytes]] = [(1, file.read())] if whole else _lines(path, file)
        rows: list[Any] = []
        for number, line in lines:
            found = _parse_json(path, number, line)
            rows += found if whole else [found]
            if wrong := next((row for row in rows[-1 if not whole else 0 :] if not isinstance(row, dict)), None):
                shown = repr(wrong) if len(repr(wrong)) < _SHOWN else f"{repr(wrong)[:_SHOWN]}…"
                raise ConfigError(f"{path}, line {number}: {shown} is no object; give one with a name for each column")
    return rows


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers.

    Only "\\n" ends one: a text in JSON may hold other characters that Python takes for the end of a line.
    """
    number = 0
    while line := file.readline(_LONGEST_LINE + 1):
        number += 1
        if len(line) > _LONGEST_LINE:
            raise ConfigError(
                f"{path}, line {number} has more than {_LONGEST_LINE // 2**20} MiB; a line holds one row, with a "
                "prompt and an answer. Is this the right file?"
            )
        if line.removeprefix(codecs.BOM_UTF8).strip():
            yield number, line.removesuffix(b"\n")


def _parse_json(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"), parse_float=WrittenNumber)
    except UnicodeDecodeError as error:
        number += line[: error.start].count(b"\n")
        raise ConfigError(f"{path}, line {number} is no UTF-8 text ({error.reason}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {number + error.lineno - 1}: this is not JSON ({error.msg}, column {error.colno}); give "
            "one object a line, or one list of objects"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}, line {number} cannot be read: {error}") from error


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    _check_size(path)
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
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}, after line {lines.line_num}: this is no UTF-8 text ({error.reason}); save the file as UTF-8"
            ) from error
    return rows


def _check_size(path: Path) -> None:
    """Raise ConfigError for a file without content, or with more than a process should read."""
    size = path.stat().st_size
    if size == 0:
        raise ConfigError(f"{path} is empty; give a file with rows")
    if size > _LARGEST_FILE:
        raise ConfigError(
            f"{path} has {size / 2**30:.0f} GiB, and {_LARGEST_FILE // 2**30} GiB at most are read into memory; cut "
            "it to the rows that the run needs, or save them as .parquet"
        )
