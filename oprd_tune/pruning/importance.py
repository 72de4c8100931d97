"""What matters in a decoder, measured on texts: its blocks, channels, heads and inner units.

All means are over the tokens of all rows, in fp64. Rows are read one at a time, so no padding is ever measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from oprd_tune.modeling.output import device_of, token_logprobs

Rows = Sequence[Sequence[int]]  # token ids; each row has at least two


@dataclass
class Importance:
    """How much the parts of a decoder matter. All are non-negative; only their order within a tensor counts.

    Attributes:
        channels_D: the mean square of each channel of the normalised states. Each norm's output is first divided by its
            own mean square, so that all norms count alike.
        groups: for each block, [G]: the mean of ‖W_o a‖² over tokens, where a is what the attention of one query head
            gives and W_o its part of the output projection; summed over the heads of a group.
        units: for each block, [F]: the mean of a² over tokens, where a is the unit's activation, times ‖w‖² of its
            column w of the down projection.
    """

    channels_D: Tensor
    groups: list[Tensor]
    units: list[Tensor]


def perplexity(model: TransformerDecoder, rows: Rows, starts: Sequence[int] | None = None) -> float:
    """exp(mean of −log p), in nats, over the tokens that are scored; infinite if a float cannot hold it.

    Args:
        starts: for each row, the place, from 0, of the first token that is scored, 1 or more. None scores all tokens
            that have one before them.
    """
    total, count = 0.0, 0
    for row, start in zip(rows, starts or [1] * len(rows), strict=True):
        tokens_BS = torch.tensor([list(row)], device=device_of(model))
        mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
        mask_BS[:, :start] = False
        logprob_T = token_logprobs(model, tokens_BS, mask_BS)
        total, count = total - logprob_T.double().sum().item(), count + logprob_T.numel()
    return math.exp(total / count) if total / count < 700 else math.inf


def measure_blocks(
    model: TransformerDecoder, rows: Rows, starts: Sequence[int] | None = None
) -> tuple[float, list[float]]:
    """The perplexity, and how much each block changes the states: 1 − mean cosine of its input and output.

    Args:
        starts: as in `perplexity`. The cosines are over all tokens.
    """
    cosines = [0.0] * len(model.layers)
    tokens = sum(map(len, rows))

    def watch(place: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(block: nn.Module, inputs: Any, output_BSD: Tensor) -> None:
            cosine_BS = torch.nn.functional.cosine_similarity(inputs[0].float(), output_BSD.float(), dim=-1)
            cosines[place] += cosine_BS.double().sum().item()

        return hook

    with ExitStack() as scope:
        for place, block in enumerate(model.layers):
            scope.callback(block.register_forward_hook(watch(place)).remove)
        found = perplexity(model, rows, starts)
    return found, [1 - cosine / tokens for cosine in cosines]


def least_changing(changes: Sequence[float], count: int) -> list[int]:
    """The numbers, from 1, of the `count` blocks that change the states least. Never the first or the last."""
    inner = range(2, len(changes))
    return sorted(sorted(inner, key=lambda number: changes[number - 1])[:count])


@torch.no_grad()
def measure_width(model: TransformerDecoder, rows: Rows) -> Importance:
    """Measure channels, groups of heads and inner units of a decoder. One forward pass over the rows.

    It keeps [heads, head_dim, head_dim] numbers for each block, and no states.
    """
    sums: dict[tuple[str, int], Tensor] = {}
    tokens = sum(map(len, rows))

    def add(key: tuple[str, int], value: Tensor) -> None:
        value = value.cpu().double() / tokens
        sums[key] = sums[key] + value if key in sums else value

    def norm_hook(place: int) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda norm, inputs, output: add(("norm", place), output.float().pow(2).flatten(0, 1).sum(0))

    def heads_hook(place: int, heads: int) -> Callable[[nn.Module, Any], None]:
        def hook(projection: nn.Module, inputs: Any) -> None:
            a_THE = inputs[0].float().flatten(0, 1).unflatten(-1, (heads, -1))
            add(("heads", place), torch.einsum("the,thf->hef", a_THE, a_THE))

        return hook

    def units_hook(place: int) -> Callable[[nn.Module, Any], None]:
        return lambda projection, inputs: add(("units", place), inputs[0].float().pow(2).flatten(0, 1).sum(0))

    blocks = list(model.layers)
    norms = [norm for block in blocks for norm in (block.sa_norm, block.mlp_norm)] + [model.norm]
    with ExitStack() as scope:
        for place, norm in enumerate(norms):
            scope.callback(norm.register_forward_hook(norm_hook(place)).remove)
        for place, block in enumerate(blocks):
            heads = heads_hook(place, block.attn.num_heads)
            scope.callback(block.attn.output_proj.register_forward_pre_hook(heads).remove)
            scope.callback(block.mlp.w2.register_forward_pre_hook(units_hook(place)).remove)
        perplexity(model, rows)
    squares = [sums["norm", place] for place in range(len(norms))]
    return Importance(
        channels_D=torch.stack([square / square.mean() for square in squares]).mean(0),
        groups=[_groups(block.attn, sums["heads", place]) for place, block in enumerate(blocks)],
        units=[_units(block.mlp.w2.weight, sums["units", place]) for place, block in enumerate(blocks)],
    )


def _groups(attention: Any, moment_HEE: Tensor) -> Tensor:
    """The mean of ‖W a‖², which is trace(WᵀW · mean of a aᵀ), of each query head; summed over a group's heads, [G]."""
    weight_DHE = attention.output_proj.weight.detach().cpu().double().unflatten(1, (attention.num_heads, -1))
    gram_HEE = torch.einsum("dhe,dhf->hef", weight_DHE, weight_DHE)
    return (gram_HEE * moment_HEE).sum((1, 2)).unflatten(0, (attention.num_kv_heads, -1)).sum(1)


def _units(weight_DF: Tensor, square_F: Tensor) -> Tensor:
    return square_F * weight_DF.detach().cpu().double().pow(2).sum(0)


def largest(scores: Tensor, count: int) -> Tensor:
    """The ascending indices of the `count` largest scores; among equal ones, the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values
