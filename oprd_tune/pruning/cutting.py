"""Cut the weights and the `config.json` of a model, in Hugging Face's names. All families here share these names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oprd_tune.pruning.request import Sizes

# What each dimension of a parameter runs over. `None` is never cut. A vector has the first entry alone.
_OUTSIDE: Mapping[str, tuple[str | None, ...]] = {
    "model.embed_tokens.weight": (None, "channels"),
    "model.norm.weight": ("channels",),
    "lm_head.weight": (None, "channels"),
}
_INSIDE: Mapping[str, tuple[str | None, ...]] = {
    "input_layernorm": ("channels",),
    "post_attention_layernorm": ("channels",),
    "self_attn.q_proj": ("queries", "channels"),
    "self_attn.k_proj": ("keys", "channels"),
    "self_attn.v_proj": ("keys", "channels"),
    "self_attn.q_norm": (None,),
    "self_attn.k_norm": (None,),
    "self_attn.o_proj": ("channels", "queries"),
    "mlp.gate_proj": ("units", "channels"),
    "mlp.up_proj": ("units", "channels"),
    "mlp.down_proj": ("channels", "units"),
}
_BLOCK = "model.layers."


@dataclass(frozen=True)
class Kept:
    """What stays of a model. Indices count from 0 and ascend; None keeps all.

    Attributes:
        blocks: the numbers of the blocks that stay, from 1.
        channels: the channels of the hidden states.
        groups: for each block that stays, its heads of keys and values, with all query heads that share them.
        units: for each block that stays, its inner units of the feed-forward layer.
    """

    blocks: Sequence[int]
    channels: Tensor | None = None
    groups: Sequence[Tensor] | None = None
    units: Sequence[Tensor] | None = None


def cut_weights(weights: Mapping[str, Tensor], kept: Kept, sizes: Sizes) -> dict[str, Tensor]:
    """The weights that stay, on the CPU, with their blocks numbered anew. What is cut is copied.

    Args:
        weights: by Hugging Face's names.
        sizes: of the whole model.

    Raises:
        KeyError: for a parameter that no family here has.
    """
    new_place = {number - 1: place for place, number in enumerate(kept.blocks)}
    outside = {"channels": kept.channels}
    inside = [_indices(kept, place, sizes) for place in range(len(kept.blocks))]
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not name.startswith(_BLOCK):
            found[name] = _cut(weight, _OUTSIDE[name], outside)
            continue
        place, _, part = name.removeprefix(_BLOCK).partition(".")
        module, _, _ = part.rpartition(".")
        if int(place) in new_place:
            new = new_place[int(place)]
            found[f"{_BLOCK}{new}.{part}"] = _cut(weight, _INSIDE[module], inside[new])
    return found


def _indices(kept: Kept, place: int, sizes: Sizes) -> dict[str, Tensor | None]:
    groups = None if kept.groups is None else kept.groups[place]
    return {
        "channels": kept.channels,
        "queries": None if groups is None else _spread(groups, sizes.heads_in_group * sizes.head_dim),
        "keys": None if groups is None else _spread(groups, sizes.head_dim),
        "units": None if kept.units is None else kept.units[place],
    }


def _spread(groups: Tensor, rows: int) -> Tensor:
    """The rows of each group, if each has so many."""
    return (groups[:, None] * rows + torch.arange(rows)).flatten()


def _cut(weight: Tensor, kinds: Sequence[str | None], indices: Mapping[str, Tensor | None]) -> Tensor:
    weight = weight.detach().cpu()
    for dimension, kind in zip(range(weight.ndim), kinds, strict=False):
        index = None if kind is None else indices[kind]
        weight = weight if index is None else weight.index_select(dimension, index)
    return weight.contiguous()


def cut_config(config: Mapping[str, Any], kept: Kept, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of a pruned model.

    Args:
        sizes: of the pruned model.
        dtype: of its weights.
    """
    changed = dict(config) | {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.feed_forward,
        "num_hidden_layers": sizes.blocks,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.groups,
        "head_dim": sizes.head_dim,
    }
    if kinds := config.get("layer_types"):
        changed["layer_types"] = [kinds[number - 1] for number in kept.blocks]
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return changed | dict.fromkeys(keys, str(dtype).removeprefix("torch."))
