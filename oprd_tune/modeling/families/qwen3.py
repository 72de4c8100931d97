"""Qwen3 from torchtune's modules: Qwen2 without biases, with heads of any width and normalised queries and keys.

The builders by size are for `model` and `teacher_model` in configs. Each also takes the arguments of `qwen3`: another
`rope_base` and `max_seq_len` build a later release of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchtune.models.convert_weights import get_mapped_key
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.peft import DoRALinear, LoRALinear
from torchtune.modules.tied_linear import TiedLinear
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.families.family import Family
from oprd_tune.torchtune_compat import (
    QWEN2_NAMES,
    Qwen2RotaryPositionalEmbeddings,
    config_of,
    forget_weight,
    other_conversions_for_qwen2,
)

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "output_proj"), ("w1", "w2", "w3")
_MakeLinear = Callable[[str, int, int], nn.Module]
_Builder = Callable[..., TransformerDecoder]


class NormedProjection(nn.Module):
    """A linear projection to heads of size `head_dim`, followed by an RMS norm of each head.

    Qwen3 rotates heads after it has normalised them. torchtune's own `q_norm` and `k_norm` run after the rotation.
    """

    def __init__(self, linear: nn.Module, head_dim: int, eps: float) -> None:
        super().__init__()
        self.linear = linear
        self.norm = RMSNorm(head_dim, eps=eps)
        self._head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).unflatten(-1, (-1, self._head_dim))).flatten(-2)


def _plain(name: str, width: int, to: int) -> nn.Module:
    return nn.Linear(width, to, bias=False)


def qwen3(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-6,
    rope_base: float = 1_000_000.0,
    tie_word_embeddings: bool = False,
    make_linear: _MakeLinear = _plain,
) -> TransformerDecoder:
    """The dense decoder of https://arxiv.org/abs/2505.09388.

    Args:
        num_heads: number of query heads; must divide `embed_dim`.
        num_kv_heads: number of key and value heads; must divide `num_heads`.
        head_dim: size of a head; `num_heads * head_dim` may differ from `embed_dim`.
        embed_dim: size of a hidden state.
        intermediate_dim: width inside the feed-forward layers.
        max_seq_len: number of positions for which rotations are tabulated.
        norm_eps: epsilon of all norms, including those of queries and keys.
        make_linear: called with the name of each linear of a block, its input width and its output width.

    Raises:
        ValueError: if a number of heads does not divide as required.
    """
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "max_seq_len": max_seq_len}
    rope = Qwen2RotaryPositionalEmbeddings(head_dim, max_seq_len, rope_base)
    norm = partial(RMSNorm, embed_dim, eps=norm_eps)
    blocks = nn.ModuleList()
    for _ in range(num_layers):
        attention = _attention(
            make_linear, embed_dim, norm_eps, pos_embeddings=rope, attn_dropout=attn_dropout, **heads
        )
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


def lora_qwen3(
    lora_attn_modules: Collection[str],
    apply_lora_to_mlp: bool = False,
    *,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    **shape: Any,
) -> TransformerDecoder:
    """`qwen3` with LoRA or DoRA adapters on linears of its blocks. `shape` takes the arguments of `qwen3`.

    Args:
        lora_attn_modules: which of q_proj, k_proj, v_proj and output_proj get adapters.
        lora_alpha: adapters are scaled by `lora_alpha / lora_rank`.
        lora_dropout: dropout probability of an adapter's input in training.

    Raises:
        ConfigError: for an unknown linear, or none at all.
    """
    adapted = {*lora_attn_modules, *(_MLP if apply_lora_to_mlp else ())}
    if not adapted or not set(lora_attn_modules) <= set(_ATTENTION):
        raise ConfigError(
            f"lora_attn_modules is {list(lora_attn_modules)}; allowed are {', '.join(_ATTENTION)}, and at least one of "
            "them, or apply_lora_to_mlp"
        )
    adapter = DoRALinear if use_dora else LoRALinear

    def make_linear(name: str, width: int, to: int) -> nn.Module:
        if name not in adapted:
            return _plain(name, width, to)
        return adapter(width, to, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout)

    return qwen3(make_linear=make_linear, **shape)


def _attention(make_linear: _MakeLinear, width: int, eps: float, **heads: Any) -> MultiHeadAttention:
    size = heads["head_dim"]
    queries, keys = heads["num_heads"] * size, heads["num_kv_heads"] * size
    return MultiHeadAttention(
        embed_dim=width,
        q_proj=NormedProjection(make_linear("q_proj", width, queries), size, eps),
        k_proj=NormedProjection(make_linear("k_proj", width, keys), size, eps),
        v_proj=make_linear("v_proj", width, keys),
        output_proj=make_linear("output_proj", queries, width),
        **heads,
    )


def _builders(layers: int, heads: int, width: int, inner: int, *, tied: bool) -> tuple[_Builder, _Builder]:
    """`qwen3` and `lora_qwen3` of one size."""
    shape: dict[str, Any] = {
        "vocab_size": 151_936,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": 8,
        "head_dim": 128,
        "embed_dim": width,
        "intermediate_dim": inner,
        "max_seq_len": 40_960,  # the config.json of base models has 32768, with the same rotations
        "tie_word_embeddings": tied,
    }
    return partial(qwen3, **shape), partial(lora_qwen3, **shape)


qwen3_0_6b, lora_qwen3_0_6b = _builders(28, 16, 1024, 3072, tied=True)
qwen3_1_7b, lora_qwen3_1_7b = _builders(28, 16, 2048, 6144, tied=True)
qwen3_4b, lora_qwen3_4b = _builders(36, 32, 2560, 9728, tied=True)
qwen3_8b, lora_qwen3_8b = _builders(36, 32, 4096, 12_288, tied=False)
qwen3_14b, lora_qwen3_14b = _builders(40, 40, 5120, 17_408, tied=False)
qwen3_32b, lora_qwen3_32b = _builders(64, 64, 5120, 25_600, tied=False)

# ---- weights from and to Hugging Face folders ----

_HEAD = "lm_head.weight"
_NAMES: dict[str, str] = {
    **{theirs: ours for theirs, ours in QWEN2_NAMES.items() if not ours.endswith(".bias")},
    **{f"model.layers.{{}}.self_attn.{x}_proj.weight": f"layers.{{}}.attn.{x}_proj.linear.weight" for x in "qk"},
    **{f"model.layers.{{}}.self_attn.{x}_norm.weight": f"layers.{{}}.attn.{x}_proj.norm.scale" for x in "qk"},
}
_NAMES_BACK = {ours: theirs for theirs, ours in _NAMES.items()}


def qwen3_hf_to_tune(
    state_dict: Mapping[str, Tensor], tie_word_embeddings: bool = False, **sizes: Any
) -> dict[str, Tensor]:
    """Rename Hugging Face's parameters, of a whole model or a part, to those of `qwen3`. The tensors are not changed.

    Args:
        tie_word_embeddings: leave out the head, which would repeat the embedding.
        sizes: ignored; torchtune passes them to its conversions.

    Raises:
        Exception: as in torchtune, for a name that Qwen3 does not have.
    """
    kept = (key for key in state_dict if not (tie_word_embeddings and key == _HEAD))
    return {get_mapped_key(key, _NAMES): state_dict[key] for key in kept}


def qwen3_tune_to_hf(state_dict: Mapping[str, Tensor], **sizes: Any) -> dict[str, Tensor]:
    """The inverse of `qwen3_hf_to_tune`. A tied head is not added back."""
    return {get_mapped_key(key, _NAMES_BACK): value for key, value in state_dict.items()}


class Qwen3HFCheckpointer(FullModelHFCheckpointer):
    """A Hugging Face checkpointer for Qwen3, which torchtune lacks: that of Qwen2 with other parameter names.

    The arguments are those of `FullModelHFCheckpointer`.
    """

    architecture = "QWEN3"

    def __init__(self, checkpoint_dir: str, checkpoint_files: list[str], output_dir: str, **kwargs: Any) -> None:
        super().__init__(checkpoint_dir, checkpoint_files, "QWEN2", output_dir, **kwargs)

    def load_checkpoint(self) -> dict[str, Any]:
        """Load as torchtune does. A tied head that the folder also stores is not written again when saving."""
        with other_conversions_for_qwen2(qwen3_hf_to_tune, qwen3_tune_to_hf):
            loaded = super().load_checkpoint()
        if config_of(self)["tie_word_embeddings"]:
            forget_weight(self, _HEAD)
        return loaded

    def save_checkpoint(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Save as torchtune does."""
        with other_conversions_for_qwen2(qwen3_hf_to_tune, qwen3_tune_to_hf):
            super().save_checkpoint(state_dict, *args, **kwargs)


FAMILY = Family("Qwen3", "qwen3", qwen3_hf_to_tune, qwen3_tune_to_hf, Qwen3HFCheckpointer)
