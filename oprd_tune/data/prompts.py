"""Prompts with reference answers, loaded by the `datasets` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, load_dataset
from torchtune.data import Message

from oprd_tune.errors import ConfigError
from oprd_tune.protocols import Tokenizer

_LOCAL_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_TEXTS = Features({"prompt": Value("string"), "answer": Value("string")})
PLACEHOLDER = "{prompt}"
CHAT = "chat"


class PromptDataset:
    """Tokenized prompts and their reference answers.

    Args:
        rows: texts `prompt` and `answer`, as a `Dataset` or a list of dicts; an answer is None if it is not known.
        max_prompt_tokens: the most tokens that a prompt may have for the student; None sets no limit. Longer prompts
            and empty ones are dropped.
        prompt_template: a plain text around `{prompt}`; None uses the tokenizer's chat template.
        system_prompt: a system message for the chat template.
        teacher_tokenizer: the tokenizer of a teacher that reads the prompts in other tokens; None if it reads these.
        teacher_prompt_template: the teacher's `prompt_template`; `chat` uses its chat template. None uses the student's
            plain text if there is one, otherwise the teacher's own chat template.

    Attributes:
        dropped: how many prompts were empty or too long.
        largest_token: the largest token id in any prompt.
        largest_teacher_token: the same in the teacher's tokens; None without `teacher_tokenizer`.
        longest_teacher_prompt: the most tokens in a prompt that the teacher reads; None without `teacher_tokenizer`.

    Raises:
        ConfigError: if a template lacks its placeholder, a system prompt has no chat template, or no prompt is left.
    """

    def __init__(
        self,
        rows: Dataset | Sequence[Mapping[str, str]],
        tokenizer: Tokenizer,
        *,
        max_prompt_tokens: int | None = None,
        prompt_template: str | None = None,
        system_prompt: str | None = None,
        teacher_tokenizer: Tokenizer | None = None,
        teacher_prompt_template: str | None = None,
    ) -> None:
        if teacher_prompt_template is not None and teacher_tokenizer is None:
            raise ConfigError("dataset.teacher_prompt_template is for a teacher with another tokenizer; leave it out")
        _check_template("prompt_template", prompt_template)
        teacher_template = prompt_template if teacher_prompt_template is None else teacher_prompt_template
        teacher_template = None if teacher_template == CHAT else teacher_template
        _check_template("teacher_prompt_template", teacher_template, f", or be `{CHAT}`")
        if system_prompt is not None and None not in (prompt_template, teacher_template):
            raise ConfigError("dataset.system_prompt belongs to a chat template; write it into prompt_template instead")
        self._tokenizer = tokenizer
        self._readers = {"tokens": (tokenizer, prompt_template)}
        if teacher_tokenizer is not None:
            self._readers["teacher_tokens"] = (teacher_tokenizer, teacher_template)
        self._system_prompt = system_prompt
        if not isinstance(rows, Dataset):
            rows = Dataset.from_list([{"answer": None, **row} for row in rows])
        found = len(rows)
        # Not read from the library's disk cache: its keys do not tell one tokenizer from another.
        tokenized = rows.map(self._tokenize, desc="Tokenizing prompts", load_from_cache_file=False)
        kept = tokenized.filter(_fits, fn_kwargs={"longest": max_prompt_tokens or 2**31}, load_from_cache_file=False)
        self.dropped = found - len(kept)
        if not len(kept):
            reason = f"all {found} prompts are empty or longer than max_prompt_tokens {max_prompt_tokens}"
            reason = reason if found else "it has no rows"
            raise ConfigError(f"the data set is empty after filtering: {reason}")
        self._tokens: list[list[int]] = kept["tokens"][:]
        self._answers: list[str | None] = kept["answer"][:]
        self.largest_token = max(map(max, self._tokens))
        has_reader = teacher_tokenizer is not None
        self._teacher_tokens: list[list[int]] | None = kept["teacher_tokens"][:] if has_reader else None
        self.largest_teacher_token = max(map(max, self._teacher_tokens)) if self._teacher_tokens else None
        self.longest_teacher_prompt = max(map(len, self._teacher_tokens)) if self._teacher_tokens else None

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> tuple[tuple[int, ...], str | None]:
        """Prompt tokens and reference answer."""
        return tuple(self._tokens[index]), self._answers[index]

    def teacher_prompt(self, index: int) -> tuple[int, ...] | None:
        """The prompt in the teacher's tokens; None if the teacher reads the student's tokens."""
        return None if self._teacher_tokens is None else tuple(self._teacher_tokens[index])

    def as_teacher_reads(self) -> PromptDataset:
        """The same prompts and answers in the teacher's tokens; this data set if it reads the student's tokens."""
        if self._teacher_tokens is None:
            return self
        view = copy(self)
        view._tokens, view._tokenizer = self._teacher_tokens, self._readers["teacher_tokens"][0]
        return view

    @property
    def has_answers(self) -> bool:
        """Whether every prompt has a reference answer."""
        return all(answer is not None for answer in self._answers)

    def answer_tokens(self, index: int) -> tuple[int, ...]:
        """The tokens of the reference answer, and EOS."""
        answer = self._answers[index]
        if answer is None:
            raise ConfigError("this data set has no reference answers; give dataset.answer_column")
        return (*self._tokenizer.encode(answer, add_bos=False, add_eos=False), self._tokenizer.eos_id)

    def _tokenize(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        prompt = row["prompt"]
        return {name: self._read(prompt, *reader) if prompt else [] for name, reader in self._readers.items()}

    def _read(self, prompt: str, tokenizer: Tokenizer, template: str | None) -> list[int]:
        if template is not None:
            return tokenizer.encode(template.replace(PLACEHOLDER, prompt), add_bos=False, add_eos=False)
        messages = [Message(role="user", content=prompt), Message(role="assistant", content="")]
        if self._system_prompt is not None:
            messages.insert(0, Message(role="system", content=self._system_prompt))
        return tokenizer.tokenize_messages(messages, add_eos=False)[0]


def _check_template(name: str, template: str | None, otherwise: str = "") -> None:
    if template is not None and PLACEHOLDER not in template:
        raise ConfigError(f"dataset.{name} is {template!r}; it must contain {PLACEHOLDER}{otherwise}")


def _fits(row: Mapping[str, Any], longest: int) -> bool:
    return 0 < len(row["tokens"]) <= longest and row.get("teacher_tokens") != []


def prompt_dataset(
    tokenizer: Tokenizer,
    *,
    source: str,
    prompt_column: str,
    answer_column: str | None = None,
    split: str = "train",
    subset: str | None = None,
    first: int | None = None,
    max_prompt_tokens: int | None = None,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    teacher_tokenizer: Tokenizer | None = None,
    teacher_prompt_template: str | None = None,
) -> PromptDataset:
    """Load prompts from the hub or from a local file. `PromptDataset` describes the arguments that are not listed here.

    Args:
        source: a hub name such as `openai/gsm8k`, or a path to a .json, .jsonl, .csv or .parquet file.
        prompt_column: the column with the prompts' texts.
        answer_column: the column with the reference answers, for evaluation and perplexity.
        split: a split of the hub's data set or of the file; may be a slice such as `train[:2000]`.
        subset: the configuration of the hub's data set, such as `main`.
        first: keep only this many rows, from the start.

    Raises:
        ConfigError: if the source cannot be read or lacks a named column, or if no prompt is left.
    """
    data = _load(source, split, subset)
    columns = {"prompt": prompt_column} | ({"answer": answer_column} if answer_column else {})
    if missing := [column for column in columns.values() if column not in data.column_names]:
        raise ConfigError(f"{source} has no column {missing}; it has {data.column_names}")
    data = data.select(range(min(first, len(data)))) if first is not None else data
    data = data.select_columns(list(dict.fromkeys(columns.values())))
    rows = data.map(_rename, fn_kwargs={"columns": columns}, remove_columns=data.column_names, features=_TEXTS)
    return PromptDataset(
        rows,
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        prompt_template=prompt_template,
        system_prompt=system_prompt,
        teacher_tokenizer=teacher_tokenizer,
        teacher_prompt_template=teacher_prompt_template,
    )


def _load(source: str, split: str, subset: str | None) -> Dataset:
    path = Path(source).expanduser()
    try:
        if path.suffix in _LOCAL_FORMATS:
            if not path.is_file():
                raise ConfigError(f"dataset.source: there is no file {path}")
            return load_dataset(_LOCAL_FORMATS[path.suffix], data_files=str(path), split=split)
        return load_dataset(source, subset, split=split)
    except ConfigError:
        raise
    except Exception as error:  # the library raises many kinds, most of them about the hub
        raise ConfigError(
            f"dataset.source {source!r} (split {split!r}) cannot be loaded: {error}. Give a hub name, or a file "
            f"ending in {', '.join(_LOCAL_FORMATS)}"
        ) from error


def _rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    texts = {new: None if row[old] is None else str(row[old]) for new, old in columns.items()}
    return {"answer": None} | texts


def in_memory(prompts: Sequence[str], answers: Sequence[str]) -> Dataset:
    """A data set of texts that are already in memory."""
    return Dataset.from_dict({"prompt": list(prompts), "answer": list(answers)})
