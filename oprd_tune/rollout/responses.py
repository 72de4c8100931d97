"""From sampled responses, in whatever order they came, to a rollout."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oprd_tune.types import Prompts, Rollout


@dataclass(frozen=True)
class Response:
    """One sampled response; K is 0 unless top-k ids were asked for.

    Attributes:
        tokens_T: the sampled ids, a stop token included.
        logprobs_T: that the sampler gave them, in nats, at temperature 1.
        top_ids_TK: its most probable tokens at each place.
        top_mass_T: their probability together.
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
    """Right-padded rows of prompt and response.

    Args:
        prompts: what was answered.
        responses: those to the first prompt, then those to the second, and so on.
        samples_per_prompt: responses to each prompt.
        stop_tokens: a response that ends with none of them was cut.
        pad_id: fills rows up to the longest.
        policy_version: of the weights that sampled.
        device: where the rollout is wanted.
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
    return Rollout(
        tokens_BS=tokens_BS.to(device),
        response_mask_BS=mask_BS.to(device),
        sampler_logprobs_BS=logprobs_BS.to(device),
        lengths_B=torch.tensor(lengths, device=device),
        truncated_B=torch.isin(last_token_B, torch.tensor(sorted(stop_tokens), dtype=torch.long), invert=True).to(
            device
        ),
        prompt_positions_B=torch.tensor(positions, device=device),
        policy_version=policy_version,
        sampler_top_ids_BSK=top_ids_BSK.to(device) if top_k else None,
        sampler_top_mass_BS=top_mass_BS.to(device) if top_k else None,
    )
