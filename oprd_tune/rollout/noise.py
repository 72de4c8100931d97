"""Counter-based uniform noise: what is sampled depends on the seed, the stream and the sample, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def sample_noise(seed: int, stream: int, sample_indices: Sequence[int], length: int) -> Tensor:
    """Uniform numbers for inverse-CDF sampling, one row per sample.

    Each row is a Philox stream of its own, keyed by `seed`, at the counter (`stream`, sample index). So neither
    the batch that a sample is generated in nor the number of ranks changes its noise.

    Args:
        seed: the run's seed.
        stream: for example the training step.
        sample_indices: global indices of the samples, B of them.
        length: tokens per sample.

    Returns:
        fp64, shape [B, length], in [0, 1).
    """
    rows = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, stream, index])).random(length)
        for index in sample_indices
    ]
    return torch.from_numpy(np.stack(rows))
