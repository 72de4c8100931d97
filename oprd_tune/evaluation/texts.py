"""Responses as texts, for graders and for logs; and a check that a data set has reference answers."""

from __future__ import annotations

import torch
from torch import Tensor

from oprd_tune.errors import ConfigError
from oprd_tune.protocols import PromptSource, Tokenizer
from oprd_tune.types import Rollout


def need_answers(dataset: PromptSource | None, component: str) -> PromptSource:
    """The data set of an evaluation; raises ConfigError if the component has no data set or no reference answers."""
    if dataset is None:
        raise ConfigError(f"{component} needs an eval_dataset, with held-out prompts")
    if not dataset.has_answers:
        raise ConfigError(f"{component} needs reference answers; give eval_dataset.answer_column")
    return dataset


def decode_responses(tokens_BS: Tensor, response_mask_BS: Tensor, tokenizer: Tokenizer) -> list[str]:
    """The text of each row's marked tokens, without stop tokens."""
    rows = zip(tokens_BS.tolist(), response_mask_BS.tolist(), strict=True)
    stops = set(tokenizer.stop_tokens)
    kept = [[t for t, marked in zip(tokens, mask, strict=True) if marked and t not in stops] for tokens, mask in rows]
    return [tokenizer.decode(tokens) for tokens in kept]


def samples_as_markdown(rollout: Rollout, tokenizer: Tokenizer, count: int = 4) -> str:
    """The first prompts and responses of a rollout as Markdown, for the log."""
    shown = rollout.rows(torch.arange(min(count, len(rollout)), device=rollout.tokens_BS.device))
    columns_S = torch.arange(shown.tokens_BS.shape[1], device=shown.tokens_BS.device)
    prompt_mask_BS = (columns_S < shown.lengths_B[:, None]) & ~shown.response_mask_BS
    prompts = decode_responses(shown.tokens_BS, prompt_mask_BS, tokenizer)
    responses = decode_responses(shown.tokens_BS, shown.response_mask_BS, tokenizer)
    texts = zip(prompts, responses, strict=True)
    return "\n\n---\n\n".join(f"**prompt**\n\n```\n{p}\n```\n\n**response**\n\n```\n{r}\n```" for p, r in texts)
