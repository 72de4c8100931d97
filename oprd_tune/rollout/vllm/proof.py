"""The proof that a rollout is on-policy: trainer and sampler give its tokens the same probabilities."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torchtune.modules import TransformerDecoder

from oprd_tune.errors import RolloutError
from oprd_tune.modeling.output import token_logprobs
from oprd_tune.modeling.sharding import gathered
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.vllm.policy_weights import PolicyWeights
from oprd_tune.types import LogprobGap, Rollout

PROOF_ROWS = 4
PROOF_TOKENS = 32  # of each response: the first ones, so the forward pass can end after them
_COLUMNS = 192  # of all rows together, prompts and padding included, unless the first row alone has more
# Rounding does not reach these mean gaps: two implementations agree to about 1e-5 in fp32, and to 1e-2 in bf16.
_DEFAULT_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


def prove_on_policy(rollout: Rollout, weights: PolicyWeights, limit: float | None) -> Rollout:
    """Compare a few tokens of a rollout with the trainer's own forward pass. All ranks must call.

    Returns the rollout with its `logprob_gap`.

    Args:
        weights: the weights that the engine should have sampled with.
        limit: the largest mean gap allowed, in nats; None uses the one in `_DEFAULT_LIMITS`.

    Raises:
        RolloutError: if the mean gap over all ranks is above the limit, or not a number.
    """
    if limit is None:
        limit = _DEFAULT_LIMITS[weights.dtype]
    gap = measure_gap(rollout, weights.model, weights.ranks, vocabulary=weights.vocabulary)
    if not gap.mean <= limit:
        raise RolloutError(
            f"the rollout of policy version {rollout.policy_version} is not the student's: log-probabilities of "
            f"{gap.tokens} sampled tokens differ from the trainer's by {gap.mean:.3g} nats in the mean, at most "
            f"{gap.largest:.3g}; rollout.logprob_gap_limit allows {limit:.3g}"
        )
    return replace(rollout, logprob_gap=gap)


def measure_gap(
    rollout: Rollout, model: TransformerDecoder, ranks: Ranks, *, vocabulary: int | None = None
) -> LogprobGap:
    """The gap between sampler and trainer at the first tokens of a few responses: those to the shortest prompts."""
    started = time.perf_counter()
    counts_B = rollout.response_mask_BS.sum(1)
    prompts_B, order_B = (rollout.lengths_B - counts_B).sort(stable=True)
    widths_B = (prompts_B + counts_B[order_B].clamp(max=PROOF_TOKENS)).cummax(0).values
    sizes_B = widths_B * torch.arange(1, len(order_B) + 1, device=widths_B.device)  # tokens in the first 1, 2, … rows
    chosen_B = order_B[: max(1, int((sizes_B[:PROOF_ROWS] <= _COLUMNS).sum()))]
    few, width = rollout.rows(chosen_B), int(widths_B[len(chosen_B) - 1])
    mask_BS = few.response_mask_BS & (few.response_mask_BS.cumsum(1) <= PROOF_TOKENS)
    tokens_BS, mask_BS = few.tokens_BS[:, :width], mask_BS[:, :width]
    # FSDP2 gathers blocks and an untied head when they run, but not an embedding that is used as the head.
    with gathered(model.tok_embeddings), torch.compiler.set_stance("force_eager"):
        trainers_T = token_logprobs(model, tokens_BS, mask_BS, vocabulary=vocabulary)
    gap_T = (trainers_T - few.sampler_logprobs_BS[:, :width][mask_BS]).abs().double()
    total, tokens = ranks.total([gap_T.sum().item(), gap_T.numel()])
    largest = ranks.largest(gap_T.max().item())
    return LogprobGap(total / tokens, largest, int(tokens), time.perf_counter() - started)
