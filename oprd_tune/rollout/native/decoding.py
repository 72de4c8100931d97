"""Incremental decoding with torchtune's attention: a scope in which every block has a key-value cache.

torchtune's own cache is static. It expands the key-value heads, and every token attends over the cache's whole length.
The cache here grows, and attention reads its filled part only. Query heads that share a key-value head become rows of
one query in a decoding step, so nothing is expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchtune.modules import MultiHeadAttention, TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear

from oprd_tune.modeling.output import Head, LastPositionHead, swapped_output
from oprd_tune.protocols import DecodesItself

_FEW_ROWS = 64
_MARGIN = 32  # spare columns when a cache grows


class DecodingCache:
    """The keys and values of all layers for B left-padded rows, and the columns that each row may see.

    Args:
        visible_BS: True on the tokens of the prompts, False on padding. The prompts fill the first columns.
        capacity: the maximum number of columns, prompts included. Memory is allocated as they fill.
    """

    def __init__(self, visible_BS: Tensor, capacity: int) -> None:
        batch, self._prompt_columns = visible_BS.shape
        self.columns = 0
        self.device = visible_BS.device
        self._capacity = capacity
        self._padded = not bool(visible_BS.all())
        self._visible_BS = torch.ones(batch, capacity, dtype=torch.bool, device=visible_BS.device)
        self._visible_BS[:, : self._prompt_columns] = visible_BS
        self._keys_values: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key_BHSD: Tensor, value_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write new columns of one layer. Returns views of all its columns so far."""
        end = self.columns + key_BHSD.shape[2]
        stores = self._keys_values.get(layer)
        if stores is None or stores[0].shape[2] < end:
            columns = min(self._capacity, max(end + _MARGIN, end * 5 // 4))
            old = stores or (key_BHSD[:, :, :0], value_BHSD[:, :, :0])
            self._keys_values[layer] = stores = (self._copy(old[0], columns), self._copy(old[1], columns))
        for store, new in zip(stores, (key_BHSD, value_BHSD), strict=True):
            store[:, :, self.columns : end] = new
        return stores[0][:, :, :end], stores[1][:, :, :end]

    def _copy(self, store: Tensor, columns: int, index_B: Tensor | None = None) -> Tensor:
        """Copy the filled columns of the given rows, or of all rows, to a new store with room for `columns`."""
        rows, heads, _, width = store.shape
        copy = store.new_empty(rows if index_B is None else len(index_B), heads, columns, width)
        filled = store[:, :, : self.columns]
        copy[:, :, : filled.shape[2]] = filled if index_B is None else filled[index_B]
        return copy

    def advance(self, length: int) -> None:
        """Count `length` columns as filled, after a forward pass has written them in all layers."""
        self.columns += length

    def mask(self, new_columns: int) -> Tensor | None:
        """The columns that new queries see, [B, 1, Q, S] with Q = 1 in a decoding step. None means all, causally."""
        if not self._padded:
            return None
        end = self.columns + new_columns
        visible_B1S = self._visible_BS[:, None, :end]
        if new_columns == 1:
            return visible_B1S[:, None]
        causal_SS = torch.ones(new_columns, end, dtype=torch.bool, device=visible_B1S.device).tril(end - new_columns)
        # A query at a padding column sees itself. Otherwise its softmax would be empty and its output NaN.
        itself_SS = torch.eye(new_columns, end, dtype=torch.bool, device=visible_B1S.device)
        return ((visible_B1S & causal_SS) | itself_SS)[:, None]

    def keep_rows(self, index_B: Tensor) -> None:
        """Drop all other rows."""
        self._visible_BS = self._visible_BS[index_B]
        self._padded = not bool(self._visible_BS[:, : self._prompt_columns].all())
        for layer, (keys, values) in self._keys_values.items():  # one by one, so memory never holds two caches
            columns = keys.shape[2]
            self._keys_values[layer] = (self._copy(keys, columns, index_B), self._copy(values, columns, index_B))


def _cached_attention(
    attn: MultiHeadAttention,
    layer: int,
    cache: DecodingCache,
    x: Tensor,
    y: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    input_pos: Tensor | None = None,
) -> Tensor:
    """Computes the same as `MultiHeadAttention.forward`, with the keys and values in `cache`."""
    batch, length, _ = x.shape
    query = attn.q_proj(x).view(batch, length, attn.num_heads, attn.head_dim)
    key = attn.k_proj(x).view(batch, length, attn.num_kv_heads, attn.head_dim)
    value = attn.v_proj(x).view(batch, length, attn.num_kv_heads, attn.head_dim).transpose(1, 2)
    heads = (attn.num_heads, attn.num_kv_heads)
    rotated = attn.pos_embeddings(torch.cat((query, key), dim=2), input_pos=input_pos)
    query, key = rotated.transpose(1, 2).split(heads, dim=1)
    if attn.q_norm is not None:
        query, key = attn.q_norm(query), attn.k_norm(key)
    key, value = cache.append(layer, key, value)
    if length == 1:
        folded = query.reshape(batch, attn.num_kv_heads, -1, attn.head_dim)
        output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask)
        output = output.reshape(batch, 1, -1)
    else:
        groups = attn.num_heads // attn.num_kv_heads
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        output = output.transpose(1, 2).reshape(batch, length, -1)
    return attn.output_proj(output)


def _weight_major(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`. For one column of a few rows it computes W·xᵀ, which CPU kernels do faster than x·Wᵀ."""
    if x.shape[1] > 1 or x.shape[0] > _FEW_ROWS:
        return F.linear(x, weight, bias)
    x_DB = x[:, 0].t()
    output = torch.mm(weight, x_DB) if bias is None else torch.addmm(bias[:, None], weight, x_DB)
    return output.t()[:, None]


def _linear_forward(linear: nn.Linear, x: Tensor) -> Tensor:
    return _weight_major(x, linear.weight, linear.bias)


def _is_plain(module: object) -> TypeGuard[nn.Linear]:
    """Whether a module, sharded or not, is an ordinary linear layer whose weights are not quantised."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    return type(module.weight.data) is Tensor


def _patches(model: TransformerDecoder, head: Head, cache: DecodingCache) -> dict[nn.Module, Callable[..., Tensor]]:
    """The forward functions to use while decoding, by module."""
    patches: dict[nn.Module, Callable[..., Tensor]] = {
        layer.attn: partial(_cached_attention, layer.attn, i, cache) for i, layer in enumerate(model.layers)
    }
    if cache.device.type == "cpu":
        patches |= {m: partial(_linear_forward, m) for m in model.modules() if _is_plain(m)}
        if isinstance(head, TiedLinear):
            patches[head.linear] = _weight_major
        elif _is_plain(head):
            patches[head] = partial(_linear_forward, head)
    return patches


@contextmanager
def incremental_decoding(model: TransformerDecoder, visible_BP: Tensor, max_new_tokens: int) -> Iterator[Any]:
    """Within the scope, `model(tokens, mask=cache.mask(n), input_pos=…)` continues its rows by n columns.

    It returns the logits [B, 1, V] of the last column. Call `cache.advance(n)` after each pass. When the scope ends,
    even by an exception, the model is as it was before. A model that `DecodesItself` brings its own cache.

    Args:
        visible_BP: True on the tokens of left-padded prompts, False on padding.
        max_new_tokens: the maximum number of columns beyond the prompts.

    Raises:
        RuntimeError: if the model is already decoding or tapped.
    """
    if isinstance(model, DecodesItself):
        with swapped_output(model, LastPositionHead), model.decoding(visible_BP, max_new_tokens) as own_cache:
            yield own_cache
        return
    cache = DecodingCache(visible_BP, visible_BP.shape[1] + max_new_tokens)
    patches = _patches(model, model.output, cache)
    with swapped_output(model, LastPositionHead), torch.compiler.set_stance("force_eager"):
        for module, forward in patches.items():
            module.forward = forward
        try:
            yield cache
        finally:
            for module in patches:
                del module.forward
