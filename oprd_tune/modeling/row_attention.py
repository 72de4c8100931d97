"""Attention within rows that are laid end to end, so that no padding is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from torchtune.modules import MultiHeadAttention, TransformerDecoder

from oprd_tune.packing import Packed
from oprd_tune.torchtune_compat import attention_call, set_attention_call

_AMPERE, _LARGEST_HEAD = 8, 256
_CAUSAL = (-1, 0)  # as a window: all that lies before, nothing that comes after


class RowAttention:
    """The attention of a block of torchtune's, which also takes `Packed` rows in the place of a mask.

    Args:
        usual: what the block called before, and calls for everything else.
    """

    def __init__(self, usual: Callable[..., Tensor]) -> None:
        self._usual = usual

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Any, **options: Any) -> Tensor:
        """[B, H, S, size of a head] to the same."""
        if not isinstance(mask, Packed):
            return self._usual(q, k, v, mask=mask, **options)
        return attend(q.squeeze(2), k.squeeze(2), v.squeeze(2), mask).unsqueeze(2)


@torch.compiler.disable  # blocks would be compiled again for every set of lengths
def attend(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, rows: Packed) -> Tensor:
    """Causal attention within each of the rows, [N, H, size of a head]."""
    if _has_kernel(q_NHD):
        starts_B, longest = rows.starts_B, max(rows.lengths)
        output_NHD = varlen_attn(q_NHD, k_NHD, v_NHD, starts_B, starts_B, longest, longest, window_size=_CAUSAL)
        assert isinstance(output_NHD, Tensor)
        return output_NHD
    parts = zip(*(tensor.transpose(0, 1).split(rows.lengths, dim=1) for tensor in (q_NHD, k_NHD, v_NHD)), strict=True)
    found = [F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0] for q, k, v in parts]
    return torch.cat([part.transpose(0, 1) for part in found])


def _has_kernel(q_NHD: Tensor) -> bool:
    """Flash attention runs from Ampere on, with up to 256 numbers a head."""
    if not q_NHD.is_cuda or q_NHD.dtype != torch.bfloat16 or q_NHD.shape[-1] > _LARGEST_HEAD:
        return False
    return torch.cuda.get_device_capability(q_NHD.device)[0] >= _AMPERE


def take_rows(model: Any) -> Any:
    """Let a decoder read `Packed` rows, if all of its blocks attend to all that lies before; returns the model."""
    if isinstance(model, TransformerDecoder) and all(_attends_plainly(block) for block in model.layers):
        for block in model.layers:
            set_attention_call(block.attn, RowAttention(attention_call(block.attn)))
    return model


def takes_rows(model: Any) -> bool:
    """Whether a model, its blocks wrapped or not, can read `Packed` rows."""
    if not isinstance(model, TransformerDecoder):
        return False
    attentions = [getattr(block, "attn", None) for block in model.layers]
    return all(
        isinstance(attention, MultiHeadAttention) and isinstance(attention_call(attention), RowAttention)
        for attention in attentions
    )


def _attends_plainly(block: Any) -> bool:
    attention: Any = getattr(block, "attn", None)
    return (
        type(attention) is MultiHeadAttention
        and attention.is_causal
        and not attention.attn_dropout
        and attention.kv_cache is None
        and getattr(block, "mask_mod", None) is None
    )
