"""Uniform noise that depends on the seed, the stream and the sample, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BLOCK = 256


def sample_noise(seed: int, stream: int, sample_indices: Sequence[int], length: int) -> Tensor:
    """Uniform numbers for inverse-CDF sampling, one row per sample: fp64, shape [B, length], in [0, 1).

    Each row is a Philox stream of its own, with `seed` as key and (`stream`, sample index) as counter. So neither the
    batch that a sample is generated in nor the number of ranks changes its noise.

    Args:
        stream: for example the training step.
        sample_indices: indices of the B samples, counted over all ranks.
        length: tokens per sample.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, stream, index])).random(length)
        for index in sample_indices
    ]
    return torch.from_numpy(np.stack(rows))


def inverse_cdf(weight_BV: Tensor, noise_B1: Tensor) -> Tensor:
    """Draw one index per row, with probability proportional to its weight. Returns shape [B, 1].

    It first draws a block and then a place within the block. So only the sums of blocks are accumulated over a row. An
    index of weight 0 is never drawn.

    Args:
        weight_BV: non-negative weights, not necessarily normalised.
        noise_B1: fp64, in [0, 1).
    """
    rows, size = weight_BV.shape
    padded_BV = torch.nn.functional.pad(weight_BV, (0, -size % _BLOCK))
    block_BNK = padded_BV.view(rows, -1, _BLOCK)
    cumulative_BN = block_BNK.sum(-1, dtype=torch.float64).cumsum(-1)
    threshold_B1 = noise_B1 * cumulative_BN[:, -1:]
    block_B1 = torch.searchsorted(cumulative_BN, threshold_B1, right=True).clamp(max=cumulative_BN.shape[1] - 1)
    before_B1 = torch.where(block_B1 > 0, cumulative_BN.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    within_BK = block_BNK[torch.arange(rows, device=block_BNK.device), block_B1[:, 0]].cumsum(-1, dtype=torch.float64)
    # The two levels round differently. Stay below the block's own total, or the place could have weight 0.
    rest_B1 = torch.minimum(threshold_B1 - before_B1, within_BK[:, -1:].nextafter(within_BK.new_zeros(())))
    drawn_B1 = block_B1 * _BLOCK + torch.searchsorted(within_BK, rest_B1, right=True)
    return drawn_B1.clamp(max=size - 1)  # needed only if weights are not finite


def sample_seed(seed: int, stream: int, sample_index: int) -> int:
    """A 63-bit seed for engines that draw their own noise. It depends on the same three numbers as `sample_noise`."""
    (word,) = np.random.SeedSequence((seed, stream, sample_index)).generate_state(1, np.uint64)
    return int(word >> np.uint64(1))
