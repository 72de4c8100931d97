"""Packs sampled responses into a rollout."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from oprd_tune.types import Prompts, Rollout


@dataclass(frozen=True)
class Response:
    """One sampled response. K is 0 if no top-k ids were requested.

    Attributes:
        tokens_T: the sampled ids, including the stop token.
        logprobs_T: the sampler's log-probabilities of these tokens, in nats, at temperature 1.
        top_ids_TK: the sampler's K most probable tokens at each place.
        top_mass_T: the total probability of these K tokens.
    """

    tokens_T: Tensor
    logprobs_T: Tensor
    top_ids_TK: Tensor
    top_mass_T: Tensor


def pack_responses(
    prompts: Prompts,
    responses: Sequence[Response],
    *,
    samples_per_prompt: int,
    stop_tokens: Collection[int],
    pad_id: int,
    policy_version: int,
    device: torch.device,
) -> Rollout:
    """Put prompts and responses into right-padded rows.

    Args:
        responses: the `samples_per_prompt` responses to the first prompt, then those to the second, and so on.
        stop_tokens: a response whose last token is not one of these counts as truncated.
        policy_version: the version of the weights that sampled.
        device: where to put the rollout.
    """
    rows = [tokens for tokens in prompts.tokens for _ in range(samples_per_prompt)]
    positions = [position for position in prompts.positions for _ in range(samples_per_prompt)]
    lengths = [len(p) + len(r.tokens_T) for p, r in zip(rows, responses, strict=True)]
    shape, top_k = (len(rows), max(lengths)), responses[0].top_ids_TK.shape[1]
    tokens_BS = torch.full(shape, pad_id)
    mask_BS = torch.zeros(shape, dtype=torch.bool)
    logprobs_BS = torch.zeros(shape)
    top_ids_BSK = torch.zeros(*shape, top_k, dtype=torch.long)
    top_mass_BS = torch.zeros(shape)
    for row, (prompt, response) in enumerate(zip(rows, responses, strict=True)):
        columns = slice(len(prompt), lengths[row])
        tokens_BS[row, : len(prompt)] = torch.tensor(prompt)
        tokens_BS[row, columns], logprobs_BS[row, columns] = response.tokens_T, response.logprobs_T
        top_ids_BSK[row, columns], top_mass_BS[row, columns] = response.top_ids_TK, response.top_mass_T
        mask_BS[row, columns] = True
    last_token_B = tokens_BS[torch.arange(len(rows)), torch.tensor(lengths) - 1]
    truncated_B = torch.isin(last_token_B, torch.tensor(sorted(stop_tokens), dtype=torch.long), invert=True)
    return Rollout(
        tokens_BS=tokens_BS.to(device),
        response_mask_BS=mask_BS.to(device),
        sampler_logprobs_BS=logprobs_BS.to(device),
        lengths_B=torch.tensor(lengths, device=device),
        truncated_B=truncated_B.to(device),
        prompt_positions_B=torch.tensor(positions, device=device),
        policy_version=policy_version,
        sampler_top_ids_BSK=top_ids_BSK.to(device) if top_k else None,
        sampler_top_mass_BS=top_mass_BS.to(device) if top_k else None,
    )


def joined(rollouts: list[Rollout]) -> Rollout:
    """The rows of all rollouts, one after the other, padded with zeros. All have the same fields."""
    width = max(rollout.tokens_BS.shape[1] for rollout in rollouts)
    tensors: dict[str, Tensor] = {}
    for name in (field.name for field in fields(Rollout)):
        parts = [getattr(rollout, name) for rollout in rollouts]
        if isinstance(parts[0], Tensor):
            if "_BS" in name:
                parts = [torch.cat([part, part.new_zeros(_missing(part, width))], dim=1) for part in parts]
            tensors[name] = torch.cat(parts)
    return replace(rollouts[0], **tensors)  # type: ignore[arg-type]


def _missing(part: Tensor, width: int) -> tuple[int, ...]:
    """The shape of the columns that a part lacks."""
    return (part.shape[0], width - part.shape[1], *part.shape[2:])


def rows_of(rollout: Rollout, positions: Sequence[int]) -> Rollout:
    """The rows of some prompts, in their order."""
    rows = rollout.prompt_positions_B.tolist()
    chosen = [row for position in positions for row, found in enumerate(rows) if found == position]
    return rollout.rows(torch.tensor(chosen, device=rollout.tokens_BS.device))
