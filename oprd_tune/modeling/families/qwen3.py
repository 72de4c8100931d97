"""Qwen3 from torchtune's modules: Qwen2 without biases, with heads of any width and normalised queries and keys.

The builders by size are for `model` and `teacher_model` in configs. Each also takes the arguments of `qwen3`: another
`rope_base` and `max_seq_len` build a later release of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchtune.models.convert_weights import get_mapped_key
from torchtune.modules import RMSNorm, TransformerDecoder
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.modeling.families.decoder import MakeLinear, dense_decoder, plain_linear, with_adapters
from oprd_tune.modeling.families.family import Family, peft_names, shape_arguments
from oprd_tune.torchtune_compat import (
    QWEN2_NAMES,
    Qwen2RotaryPositionalEmbeddings,
    config_of,
    forget_weight,
    other_conversions_for_qwen2,
)

_NORMED = ("q_proj", "k_proj")
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
    make_linear: MakeLinear = plain_linear,
) -> TransformerDecoder:
    """The dense decoder of https://arxiv.org/abs/2505.09388. `dense_decoder` describes the arguments.

    Args:
        norm_eps: the epsilon of all norms, including those of queries and keys.
        make_linear: makes each linear of a block.
    """

    def make_projection(name: str, width: int, to: int) -> nn.Module:
        linear = make_linear(name, width, to)
        return NormedProjection(linear, head_dim, norm_eps) if name in _NORMED else linear

    return dense_decoder(
        make_projection,
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        attn_dropout=attn_dropout,
        norm_eps=norm_eps,
        rope=Qwen2RotaryPositionalEmbeddings(head_dim, max_seq_len, rope_base),
        tie_word_embeddings=tie_word_embeddings,
    )


lora_qwen3 = with_adapters(qwen3)


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


FAMILY = Family(
    title="Qwen3",
    model_types=("QWEN3",),
    config_name="qwen3",
    build=qwen3,
    build_lora=lora_qwen3,
    arguments=lambda config: {**shape_arguments(config), "head_dim": config.head_dim},
    to_tune=lambda weights, config: qwen3_hf_to_tune(weights, config["tie_word_embeddings"]),
    to_hf=lambda weights, config: qwen3_tune_to_hf(weights),
    to_peft=lambda adapters, config: peft_names(adapters),
    checkpointer=Qwen3HFCheckpointer,
)
