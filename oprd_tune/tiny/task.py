"""The tasks of the tiny models: `12+345=` with the answer `357`, and `12345=`, which asks for the digits reversed.

Operands have one to three digits and numbers to reverse two to six, and each length is equally likely. A hash of the
problem decides which split it belongs to. So no seed can bring a held-out problem into training.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import islice, repeat
from typing import Any

from oprd_tune.config.checks import check_seed, check_whole
from oprd_tune.data.prompts import PromptDataset
from oprd_tune.data.routing import PromptsOfTeacher, RoutedPrompts
from oprd_tune.protocols import Tokenizer

MAX_DIGITS = 3
MAX_REVERSED_DIGITS = 6
_MOST = 10_000_000  # there are 1,000,000 different ones
_HELD_OUT_IN_1000 = 50


def is_held_out(a: int, b: int = 0) -> bool:
    """True if `a+b`, or `a` to reverse, belongs to the held-out split. About 5 % do, whatever the seed."""
    mixed = ((a * 1009 + b) * 2654435761) % 2**32
    return (mixed >> 8) % 1000 < _HELD_OUT_IN_1000


def sample_problems(count: int, *, split: str, seed: int) -> list[tuple[int, int]]:
    """Draw `count` pairs of operands from the split `train` or `held_out`. Pairs may repeat.

    Raises ValueError if there is no such split.
    """
    rng = _generator("addition", split, seed)
    draws = ((_number(rng, 1, MAX_DIGITS), _number(rng, 1, MAX_DIGITS)) for _ in repeat(None))
    return list(islice((pair for pair in draws if is_held_out(*pair) == (split == "held_out")), count))


def sample_numbers(count: int, *, split: str, seed: int) -> list[int]:
    """Draw `count` numbers to reverse, as `sample_problems` does."""
    rng = _generator("reversal", split, seed)
    draws = (_number(rng, 2, MAX_REVERSED_DIGITS) for _ in repeat(None))
    return list(islice((number for number in draws if is_held_out(number) == (split == "held_out")), count))


def as_addition(a: int, b: int) -> dict[str, str]:
    """A row of the data set: prompt, answer and the name of the task."""
    return {"prompt": f"{a}+{b}=", "answer": str(a + b), "task": "addition"}


def as_reversal(number: int) -> dict[str, str]:
    """A row of the data set, likewise."""
    return {"prompt": f"{number}=", "answer": str(number)[::-1], "task": "reversal"}


def _generator(task: str, split: str, seed: int) -> random.Random:
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}; the tiny tasks have 'train' and 'held_out'")
    return random.Random(f"{task}/{split}/{seed}")


def _number(rng: random.Random, fewest: int, most: int) -> int:
    digits = rng.randint(fewest, most)
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def addition(
    tokenizer: Tokenizer,
    *,
    split: str,
    count: int,
    seed: int = 0,
    max_prompt_tokens: int | None = None,
    teacher_tokenizer: Tokenizer | None = None,
    teacher_prompt_template: str | None = None,
) -> PromptDataset:
    """Problems from `sample_problems` as a data set. `PromptDataset` describes the last three arguments.

    Raises:
        ConfigError: if the count or the seed cannot be.
    """
    check_whole("dataset.count", count, at_most=_MOST)
    check_seed("dataset.seed", seed)
    return PromptDataset(
        [as_addition(a, b) for a, b in sample_problems(count, split=split, seed=seed)],
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        prompt_template="{prompt}",
        teacher_tokenizer=teacher_tokenizer,
        teacher_prompt_template=teacher_prompt_template,
    )


def two_tasks(
    tokenizer: Tokenizer,
    *,
    split: str,
    count: int,
    seed: int = 0,
    max_prompt_tokens: int | None = None,
    teachers: Mapping[str, PromptsOfTeacher] | None = None,
    shuffled: bool = False,
) -> PromptDataset | RoutedPrompts:
    """Problems of `sample_problems` and numbers to reverse, in turn, half of `count` of each.

    Several teachers are told apart by the name of the task, `addition` or `reversal`. `RoutedPrompts` describes them.

    Args:
        shuffled: for comparison, whether each of the two teachers reads half of either task, in turn.

    Raises:
        ConfigError: if the count or the seed cannot be.
    """
    check_whole("dataset.count", count, at_least=2, at_most=_MOST)
    check_seed("dataset.seed", seed)
    problems = sample_problems(count // 2, split=split, seed=seed)
    numbers = sample_numbers(count // 2, split=split, seed=seed)
    tasks = [as_addition(a, b) for a, b in problems], map(as_reversal, numbers)
    rows = [row for pair in zip(*tasks, strict=True) for row in pair]
    if shuffled:
        names = [row["task"] for row in rows]
        rows = [row | {"task": names[i - i // 2 % 2]} for i, row in enumerate(rows)]
    options: dict[str, Any] = {"max_prompt_tokens": max_prompt_tokens, "prompt_template": "{prompt}"}
    if teachers is None:
        return PromptDataset(rows, tokenizer, **options)
    return RoutedPrompts(rows, tokenizer, teacher_column="task", teachers=teachers, **options)
