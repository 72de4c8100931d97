"""Load a data set of prompts, from the hub or from a local file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oprd_tune.data.benchmarks import (
    Benchmark,
    find_benchmark,
    fit_to_columns,
    instruction_text,
    joined,
    with_instruction,
)
from oprd_tune.data.chats import Prompt, as_answer, as_conversation, as_prompt
from oprd_tune.data.prompts import CHAT, PromptDataset
from oprd_tune.data.routing import PromptsOfTeacher, RoutedPrompts
from oprd_tune.data.sources import Columns, column, read_columns
from oprd_tune.data.templates import TeacherTemplate
from oprd_tune.errors import ConfigError
from oprd_tune.protocols import Tokenizer

# A data set's prompts are in the first of these columns that it has.
PROMPT_COLUMNS = ("prompt", "messages", "question", "problem")
_CONVERSATIONS = "messages"


def prompt_dataset(
    tokenizer: Tokenizer,
    *,
    source: str | None = None,
    benchmark: str | None = None,
    path: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    first: int | None = None,
    instruction: str | None = None,
    max_prompt_tokens: int | None = None,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    teacher_tokenizer: Tokenizer | None = None,
    teacher_prompt_template: str | list[Any] | None = None,
    teacher_column: str | None = None,
    teachers: Mapping[str, PromptsOfTeacher] | None = None,
) -> PromptDataset | RoutedPrompts:
    """Load prompts from the hub or from a local file. `PromptDataset` describes the arguments that are not listed here.

    Args:
        source: a hub name such as `openai/gsm8k`, or a path to a .json, .jsonl, .csv or .parquet file.
        benchmark: in place of `source`, a name in `benchmarks.BENCHMARKS`, such as `aime24`. It also decides columns,
            split, subset, revision and instruction, unless they are given.
        path: a local file with the rows of the benchmark, in the layout of the hub or of verl.
        prompt_column: the column with the prompts: texts, or lists of chat messages. None takes the first of
            `PROMPT_COLUMNS` that is there. In a column `messages`, the assistant's last message is no prompt but the
            reference answer, unless `answer_column` names another.
        answer_column: the column with the reference answers, for evaluation and perplexity; see `as_answer`. A dot
            leads into a struct, as in `reward_model.ground_truth`; likewise for `prompt_column`.
        split: a split of the hub's data set or of the file, by default `train`; may be a slice such as `train[:2000]`.
        subset: the configuration of the hub's data set, such as `main`.
        revision: a commit, branch or tag of the hub's data set; None takes its newest commit.
        first: keep only this many rows, from the start.
        teacher_column: the column that says which of several teachers reads a prompt: its name or one of its `prompts`.
        teachers: the run's teachers by name, if there are several.
        instruction: what ends the user's message: `boxed`, `none` or a text. None adds a benchmark's own, or nothing.

    Raises:
        ConfigError: if the source cannot be read, lacks a column or holds other types in it, if arguments contradict
            each other, or if no prompt is left.
    """
    own = {"prompt_column": prompt_column, "answer_column": answer_column, "instruction": instruction}
    found = find_benchmark(benchmark, source, path, split=split, subset=subset, revision=revision, **own)
    columns = read_columns(found.source, found.split, found.subset, found.revision)
    given = teacher_prompt_template
    further = [] if given in (None, CHAT) else TeacherTemplate(given, list(columns)).columns
    further += [] if teacher_column is None else [teacher_column]
    rows = _read_rows(columns, found if path is None else fit_to_columns(found, list(columns), **own), first, further)
    options: dict[str, Any] = {"max_prompt_tokens": max_prompt_tokens, "prompt_template": prompt_template}
    options |= {"system_prompt": system_prompt, "teacher_prompt_template": teacher_prompt_template}
    if teachers is None and teacher_column is None:
        return PromptDataset(rows, tokenizer, teacher_tokenizer=teacher_tokenizer, **options)
    return RoutedPrompts(rows, tokenizer, teacher_column=teacher_column, teachers=teachers, **options)


def _read_rows(
    columns: Columns, found: Benchmark, first: int | None, further: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The prompts, with their instruction, the reference answers, and `further` columns of the first rows."""
    source, instruction = found.source, instruction_text(found.instruction)
    name = found.prompt_column or next((name for name in PROMPT_COLUMNS if name in columns), None)
    if name is None:
        raise ConfigError(
            f"{source} has none of the columns {', '.join(PROMPT_COLUMNS)}; name its prompts by dataset.prompt_column. "
            f"It has {list(columns)}"
        )
    read = as_conversation if name.split(".")[-1] == _CONVERSATIONS else _prompt_alone
    values = column(columns, name, source=source, first=first)
    places = [f"row {i} of column {name!r} in {source}" for i in range(len(values))]
    pairs = [read(value, place) for value, place in zip(values, places, strict=True)]
    answers: Sequence[Any] = [answer for _, answer in pairs]
    if found.answer_column is not None:
        answers = column(columns, found.answer_column, source=source, first=first)
        answers = [joined(answer) for answer in answers] if found.answers_in_list else answers
        where = f"column {found.answer_column!r} in {source}"
        answers = [as_answer(answer, f"row {i} of {where}") for i, answer in enumerate(answers)]
    prompts = [with_instruction(p, instruction, place) for (p, _), place in zip(pairs, places, strict=True)]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    for own in further:
        if own != "answer":
            for row, value in zip(rows, column(columns, own, source=source, first=first), strict=True):
                row[own] = value
    return rows


def _prompt_alone(value: Any, where: str) -> tuple[Prompt, str | None]:
    return as_prompt(value, where), None
