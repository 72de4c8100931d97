"""The task of the tiny models: integer addition, such as `12+345=` with the answer `357`.

Operands have one to three digits, and each length is equally likely. A hash of the operands decides which split a
problem belongs to. So no seed can bring a held-out problem into training.
"""

from __future__ import annotations

import random

from oprd_tune.config.checks import check_seed, check_whole
from oprd_tune.data.prompts import PromptDataset
from oprd_tune.protocols import Tokenizer

MAX_DIGITS = 3
_MOST = 10_000_000  # there are 1,000,000 different ones
_HELD_OUT_IN_1000 = 50


def is_held_out(a: int, b: int) -> bool:
    """True if `a+b` belongs to the held-out split. About 5 % of all problems do, whatever the seed."""
    mixed = ((a * 1009 + b) * 2654435761) % 2**32
    return (mixed >> 8) % 1000 < _HELD_OUT_IN_1000


def sample_problems(count: int, *, split: str, seed: int) -> list[tuple[int, int]]:
    """Draw `count` pairs of operands from the split `train` or `held_out`. Pairs may repeat.

    Raises ValueError if there is no such split.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}; the addition task has 'train' and 'held_out'")
    rng = random.Random(f"addition/{split}/{seed}")
    problems: list[tuple[int, int]] = []
    while len(problems) < count:
        a, b = (_operand(rng) for _ in range(2))
        if is_held_out(a, b) == (split == "held_out"):
            problems.append((a, b))
    return problems


def _operand(rng: random.Random) -> int:
    digits = rng.randint(1, MAX_DIGITS)
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
    problems = sample_problems(count, split=split, seed=seed)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in problems]
    return PromptDataset(
        rows,
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        prompt_template="{prompt}",
        teacher_tokenizer=teacher_tokenizer,
        teacher_prompt_template=teacher_prompt_template,
    )
