"""Incremental decoding with torchtune's attention: a scope in which every block has a key-value cache.

torchtune's own cache expands the key-value heads, and every token attends over the cache's whole length. The caches
here grow. Query heads that share a key-value head become rows of one query in a decoding step, so nothing is expanded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torchtune.modules import MultiHeadAttention, TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear

from oprd_tune.modeling.output import Head, LastPositionHead, swapped_output
from oprd_tune.protocols import DecodesItself
from oprd_tune.rollout.native.caches import DecodingCache, SteadyCache

_FEW_ROWS = 64


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
def incremental_decoding(
    model: TransformerDecoder, visible_BP: Tensor, max_new_tokens: int, *, steady: bool = False
) -> Iterator[Any]:
    """Within the scope, `model(tokens, mask=cache.mask(n), input_pos=…)` continues its rows by n columns.

    It returns the logits [B, 1, V] of the last column. Call `cache.advance(n)` after each pass. When the scope ends,
    even by an exception, the model is as it was before. A model that `DecodesItself` brings its own cache.

    Args:
        visible_BP: True on the tokens of left-padded prompts, False on padding.
        max_new_tokens: the maximum number of columns beyond the prompts.
        steady: give a `SteadyCache`, if the model has none of its own.

    Raises:
        RuntimeError: if the model is already decoding or tapped.
    """
    if isinstance(model, DecodesItself):
        with swapped_output(model, LastPositionHead), model.decoding(visible_BP, max_new_tokens) as own_cache:
            yield own_cache
        return
    cache = (SteadyCache if steady else DecodingCache)(visible_BP, visible_BP.shape[1] + max_new_tokens)
    patches = _patches(model, model.output, cache)
    with swapped_output(model, LastPositionHead), torch.compiler.set_stance("force_eager"):
        for module, forward in patches.items():
            module.forward = forward
        try:
            yield cache
        finally:
            for module in patches:
                del module.forward


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Within the scope, FSDP2 and activation checkpointing take no part in forward passes.

    A decoding step needs neither: there are no gradients, and weights are gathered. What they do besides at each pass
    cannot be captured in a CUDA graph.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    checkpointed = [module for module in model.modules() if isinstance(module, CheckpointWrapper)]
    kept = [(module, module._forward_pre_hooks, module._forward_hooks) for module in sharded]
    for module, before, after in kept:
        module._forward_pre_hooks, module._forward_hooks = _without_fsdp(before), _without_fsdp(after)
    for wrapper in checkpointed:
        wrapper.forward = wrapper._checkpoint_wrapped_module  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, before, after in kept:
            module._forward_pre_hooks, module._forward_hooks = before, after
        for wrapper in checkpointed:
            del wrapper.forward


def _without_fsdp(hooks: dict[int, Any]) -> dict[int, Any]:
    fsdp = torch.distributed.fsdp.__name__
    owners = {key: type(getattr(hook, "__self__", None)).__module__ for key, hook in hooks.items()}
    return OrderedDict((key, hook) for key, hook in hooks.items() if not owners[key].startswith(fsdp))
