"""A dense decoder from torchtune's modules, for families whose builders torchtune lacks or keeps too narrow."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import nn
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.peft import DoRALinear, LoRALinear
from torchtune.modules.tied_linear import TiedLinear

from oprd_tune.errors import ConfigError

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "output_proj"), ("w1", "w2", "w3")
MakeLinear = Callable[[str, int, int], nn.Module]  # called with a linear's name, its input width and its output width


def plain_linear(name: str, width: int, to: int) -> nn.Module:
    """A linear without bias."""
    return nn.Linear(width, to, bias=False)


def dense_decoder(
    make_linear: MakeLinear,
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    attn_dropout: float,
    norm_eps: float,
    rope: nn.Module,
    tie_word_embeddings: bool,
) -> TransformerDecoder:
    """Blocks of grouped-query attention and a gated feed-forward layer, with RMS norms before each.

    Args:
        make_linear: makes each linear of a block.
        num_kv_heads: the number of key and value heads; must divide `num_heads`.
        head_dim: the size of a head; `num_heads * head_dim` may differ from `embed_dim`.
        embed_dim: the size of a hidden state.
        intermediate_dim: the width inside the feed-forward layers.
        max_seq_len: the number of positions that `rope` knows.
        norm_eps: the epsilon of all norms.
        rope: rotates queries and keys; all blocks share it.

    Raises:
        ValueError: if a number of heads does not divide as required.
    """
    norm = partial(RMSNorm, embed_dim, eps=norm_eps)
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "max_seq_len": max_seq_len}
    blocks = nn.ModuleList()
    for _ in range(num_layers):
        attention = _attention(make_linear, embed_dim, pos_embeddings=rope, attn_dropout=attn_dropout, **heads)
        mlp = FeedForward(
            gate_proj=make_linear("w1", embed_dim, intermediate_dim),
            down_proj=make_linear("w2", intermediate_dim, embed_dim),
            up_proj=make_linear("w3", embed_dim, intermediate_dim),
        )
        blocks.append(TransformerSelfAttentionLayer(attention, mlp, sa_norm=norm(), mlp_norm=norm()))
    embedding = nn.Embedding(vocab_size, embed_dim)
    head = TiedLinear(embedding) if tie_word_embeddings else nn.Linear(embed_dim, vocab_size, bias=False)
    return TransformerDecoder(
        tok_embeddings=embedding,
        layers=blocks,
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=norm(),
        output=head,
    )


def _attention(make_linear: MakeLinear, width: int, **options: Any) -> MultiHeadAttention:
    queries, keys = (options[heads] * options["head_dim"] for heads in ("num_heads", "num_kv_heads"))
    return MultiHeadAttention(
        embed_dim=width,
        q_proj=make_linear("q_proj", width, queries),
        k_proj=make_linear("k_proj", width, keys),
        v_proj=make_linear("v_proj", width, keys),
        output_proj=make_linear("output_proj", queries, width),
        **options,
    )


def with_adapters(build: Callable[..., TransformerDecoder]) -> Callable[..., TransformerDecoder]:
    """A builder like `build`, which takes a `make_linear`, with LoRA or DoRA adapters on linears of its blocks."""

    def build_lora(
        lora_attn_modules: Collection[str],
        apply_lora_to_mlp: bool = False,
        *,
        lora_rank: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_dora: bool = False,
        **shape: Any,
    ) -> TransformerDecoder:
        """Build the decoder with adapters. `shape` takes the other arguments of the plain builder.

        Args:
            lora_attn_modules: which of q_proj, k_proj, v_proj and output_proj get adapters.
            apply_lora_to_mlp: whether the linears of the feed-forward layers get them too.
            lora_alpha: adapters are scaled by `lora_alpha / lora_rank`.
            lora_dropout: the dropout probability of an adapter's input in training.
            use_dora: whether each adapter also learns a magnitude (DoRA).

        Raises:
            ConfigError: for an unknown linear, or none at all.
        """
        adapted = {*lora_attn_modules, *(_MLP if apply_lora_to_mlp else ())}
        if not adapted or not set(lora_attn_modules) <= set(_ATTENTION):
            raise ConfigError(
                f"lora_attn_modules is {list(lora_attn_modules)}; allowed are {', '.join(_ATTENTION)}, and at least "
                "one of them, or apply_lora_to_mlp"
            )
        adapter = DoRALinear if use_dora else LoRALinear

        def make_linear(name: str, width: int, to: int) -> nn.Module:
            if name not in adapted:
                return plain_linear(name, width, to)
            return adapter(width, to, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout)

        return build(make_linear=make_linear, **shape)

    return build_lora
