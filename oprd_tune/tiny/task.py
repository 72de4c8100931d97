"""The tiny pair's task: integer addition, written as `12+345=` and answered `357`.

Operands have one to three digits, each length equally likely, so answers have one to four. A problem belongs to the
held-out split by a hash of its operands, never by chance, so no seed can leak it into training.
"""

from __future__ import annotations

import random

from oprd_tune.data.prompts import PromptDataset, in_memory
from oprd_tune.protocols import Tokenizer

MAX_DIGITS = 3
_HELD_OUT_IN_1000 = 50


def is_held_out(a: int, b: int) -> bool:
    """True if `a+b` belongs to the held-out split: about 5 % of all problems, the same ones for everybody."""
    mixed = ((a * 1009 + b) * 2654435761) % 2**32
    return (mixed >> 8) % 1000 < _HELD_OUT_IN_1000


def sample_problems(count: int, *, split: str, seed: int) -> list[tuple[int, int]]:
    """Draw `count` addition problems of one split, with repetition among the short ones.

    Args:
        count: number of problems.
        split: `train` or `held_out`.
        seed: seeds the draw; splits stay disjoint whatever it is.

    Returns:
        Operand pairs.

    Raises:
        ValueError: if `split` is neither of the two.
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
) -> PromptDataset:
    """Addition problems as a data set of prompts and answers.

    Args:
        tokenizer: the tiny pair's.
        split: `train` or `held_out`.
        count: number of problems.
        seed: of the draw.
        max_prompt_tokens: longer prompts are dropped.
        teacher_tokenizer: of a teacher that reads the same problems in other tokens.
    """
    problems = sample_problems(count, split=split, seed=seed)
    rows = in_memory([f"{a}+{b}=" for a, b in problems], [str(a + b) for a, b in problems])
    return PromptDataset(
        rows,
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        prompt_template="{prompt}",
        teacher_tokenizer=teacher_tokenizer,
    )
