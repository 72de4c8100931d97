"""Responses as texts, for graders and for logs; and a check that a data set has reference answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from oprd_tune.errors import ConfigError, RolloutError
from oprd_tune.grading.calls import grade_all
from oprd_tune.losses.diagnostics import TokenDifference
from oprd_tune.protocols import Grader, PromptSource, Tokenizer
from oprd_tune.types import Rollout


def need_answers(dataset: PromptSource | None, component: str) -> PromptSource:
    """The data set of an evaluation; raises ConfigError if the component has no data set or no reference answers."""
    if dataset is None:
        raise ConfigError(f"{component} needs an eval_dataset, with held-out prompts")
    if not dataset.has_answers:
        missing = sum(dataset[i][1] is None for i in range(len(dataset)))
        raise ConfigError(
            f"{component} needs reference answers; give eval_dataset.answer_column. {missing} of {len(dataset)} "
            "prompts have none: if it is only some, take these rows out"
        )
    return dataset


def decode_responses(tokens_BS: Tensor, response_mask_BS: Tensor, tokenizer: Tokenizer) -> list[str]:
    """The text of each row's marked tokens, without stop tokens."""
    rows = zip(tokens_BS.tolist(), response_mask_BS.tolist(), strict=True)
    stops = set(tokenizer.stop_tokens)
    kept = [[t for t, marked in zip(tokens, mask, strict=True) if marked and t not in stops] for tokens, mask in rows]
    return [tokenizer.decode(tokens) for tokens in kept]


def samples_as_markdown(
    rollout: Rollout, tokenizer: Tokenizer, answers: Sequence[str | None], grader: Grader | None = None
) -> str:
    """The first prompts and responses of a rollout as Markdown, for the log.

    Args:
        answers: the reference answers of the first rows; None where there is none. As many rows are shown.
        grader: gives the verdict on a response with a reference answer; None gives none.
    """
    shown = rollout.rows(torch.arange(len(answers), device=rollout.tokens_BS.device))
    columns_S = torch.arange(shown.tokens_BS.shape[1], device=shown.tokens_BS.device)
    prompt_mask_BS = (columns_S < shown.lengths_B[:, None]) & ~shown.response_mask_BS
    prompts = decode_responses(shown.tokens_BS, prompt_mask_BS, tokenizer)
    responses = decode_responses(shown.tokens_BS, shown.response_mask_BS, tokenizer)
    verdicts = [""] * len(answers)
    if grader is not None and (graded := [row for row, answer in enumerate(answers) if answer is not None]):
        try:
            found = grade_all(grader, [(responses[row], str(answers[row])) for row in graded])
        except RolloutError as error:  # a look at some texts ends no run
            print(f"samples are shown without verdicts, because {error}")
            graded, found = [], []
        for row, right in zip(graded, found, strict=True):
            verdicts[row] = ", right" if right else ", wrong"
    samples = []
    for row, (prompt, response, answer) in enumerate(zip(prompts, responses, answers, strict=True)):
        cut = ", cut" if bool(shown.truncated_B[row]) else ""
        parts = [("prompt", prompt), (f"response{verdicts[row]}{cut}", response)]
        parts += [] if answer is None else [("reference answer", answer)]
        samples.append("\n\n".join(f"**{title}**\n\n{_block(text)}" for title, text in parts))
    return "\n\n---\n\n".join(samples)


def differences_as_markdown(differences: Sequence[TokenDifference], tokenizer: Tokenizer, count: int = 8) -> str:
    """The places where student and teacher differ most, with what each would have said there, as Markdown."""

    def said(candidates: Sequence[tuple[int, float]]) -> str:
        return ", ".join(f"{_inline(tokenizer.decode([token], False))} {share:.0%}" for token, share in candidates)

    rows = ["| KL, nats | after | sampled | student | teacher |", "|---|---|---|---|---|"]
    for place in sorted(differences, key=lambda place: -place.kl)[:count]:
        before, token = (_inline(tokenizer.decode(tokens, False)) for tokens in (place.before, [place.token]))
        rows.append(f"| {place.kl:.2f} | {before} | {token} | {said(place.student)} | {said(place.teacher)} |")
    return "\n".join(rows)


def _block(text: str) -> str:
    """A text as a block of code, whatever backticks it has."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def _inline(text: str) -> str:
    """A text as code in a cell of a table."""
    text = text.replace("\n", "⏎").replace("|", "¦").replace("`", "ˋ")
    return f"`{text}`"
