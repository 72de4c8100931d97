"""Llama 3, 3.1 and 3.2, Mistral without a sliding window, and others of their shape, such as SmolLM2.

torchtune has a builder for each release. The builder here takes every number from the caller. Its models have the
parameters of torchtune's: rotations turn neighbouring pairs of a head's numbers, so the rows of queries and keys are
stored in another order than in Hugging Face folders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchtune.models.convert_weights import hf_to_tune, tune_to_hf, tune_to_peft_adapter_weights
from torchtune.modules import RotaryPositionalEmbeddings, TransformerDecoder

from oprd_tune.modeling.families.decoder import MakeLinear, dense_decoder, plain_linear, with_adapters
from oprd_tune.modeling.families.family import Config, Family, Weights, shape_arguments
from oprd_tune.torchtune_compat import Llama3ScaledRoPE

_HEAD = "output.weight"
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class ScaledRotations(Llama3ScaledRoPE):
    """torchtune's rotations with the frequencies scaled as in Llama 3.1, for any factors and on any device.

    torchtune looks at each frequency in Python. That fails on tensors without data, and it takes whole factors only.

    Args:
        factor: slow rotations, those of long wavelength, become slower by this factor.
        low_freq_factor: wavelengths above `original_max_position_embeddings / low_freq_factor` are long.
        high_freq_factor: wavelengths below `original_max_position_embeddings / high_freq_factor` stay as they are.
        original_max_position_embeddings: the context, in tokens, that the model was first trained with.
    """

    def __init__(
        self,
        dim: int,
        max_seq_len: int,
        base: float,
        *,
        factor: float,
        low_freq_factor: float,
        high_freq_factor: float,
        original_max_position_embeddings: int,
    ) -> None:
        super().__init__(
            dim,
            max_seq_len,
            base,
            scale_factor=factor,
            low_freq_factor=low_freq_factor,
            high_freq_factor=high_freq_factor,
            old_context_len=original_max_position_embeddings,
        )

    def rope_init(self) -> None:
        """Compute the tables on the current device. They have shapes on the meta device, too."""
        exponent = torch.arange(0, self.dim, 2)[: self.dim // 2].float() / self.dim
        self.register_buffer("theta", self._scaled(1.0 / self.base**exponent), persistent=False)
        self.build_rope_cache(self.max_seq_len)
        self.is_cache_built = True

    def _scaled(self, theta: Tensor) -> Tensor:
        wavelength = 2 * math.pi / theta
        low, high, context = self.low_freq_factor, self.high_freq_factor, self.old_context_len
        smooth = (context / wavelength - low) / (high - low)
        between = (1 - smooth) * theta / self.scale_factor + smooth * theta
        slow = torch.where(wavelength > context / low, theta / self.scale_factor, between)
        return torch.where(wavelength < context / high, theta, slow)


def llama(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    head_dim: int | None = None,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-5,
    rope_base: float = 500_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    tie_word_embeddings: bool = False,
    make_linear: MakeLinear = plain_linear,
) -> TransformerDecoder:
    """The dense decoder of https://arxiv.org/abs/2407.21783. `dense_decoder` describes the other arguments.

    Args:
        head_dim: the size of a head; None for `embed_dim // num_heads`.
        rope_scaling: the arguments of `ScaledRotations`; None for rotations that are not scaled.
        make_linear: makes each linear of a block.
    """
    size = head_dim or embed_dim // num_heads
    if rope_scaling is None:
        rope = RotaryPositionalEmbeddings(size, max_seq_len, rope_base)
    else:
        rope = ScaledRotations(size, max_seq_len, rope_base, **rope_scaling)
    return dense_decoder(
        make_linear,
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=size,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        attn_dropout=attn_dropout,
        norm_eps=norm_eps,
        rope=rope,
        tie_word_embeddings=tie_word_embeddings,
    )


lora_llama = with_adapters(llama)


def _arguments(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    scaling = {key: rope[key] for key in _SCALING} if rope["rope_type"] == "llama3" else None
    return {**shape_arguments(config), "head_dim": config.head_dim, "rope_scaling": scaling}


# ---- weights from and to Hugging Face folders ----


def _heads(config: Config) -> dict[str, Any]:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    return {
        "num_heads": heads,
        "num_kv_heads": config["num_key_value_heads"],
        "dim": width,
        "head_dim": config.get("head_dim") or width // heads,
    }


def _to_tune(weights: Weights, config: Config) -> dict[str, Tensor]:
    converted = hf_to_tune(weights, **_heads(config))
    if config["tie_word_embeddings"]:
        converted.pop(_HEAD, None)
    return converted


def _to_hf(weights: Weights, config: Config) -> dict[str, Tensor]:
    return tune_to_hf(weights, **_heads(config))


def _to_peft(adapters: Weights, config: Config) -> dict[str, Tensor]:
    """torchtune's renaming, which reorders the rows of `lora_B`. The rows of DoRA's magnitudes belong to them."""
    heads = _heads(config)
    columns = {key: value[:, None] if value.ndim == 1 else value for key, value in adapters.items()}
    converted: dict[str, Tensor] = {}
    for key, value in columns.items():
        renamed = tune_to_peft_adapter_weights({key: value}, **heads)
        if key.endswith(".magnitude"):
            as_matrix = tune_to_peft_adapter_weights({key.replace(".magnitude", ".lora_b.weight"): value}, **heads)
            renamed = dict(zip(renamed, (matrix[:, 0] for matrix in as_matrix.values()), strict=True))
        converted |= renamed
    return converted


FAMILY = Family(
    title="Llama",
    model_types=("LLAMA3", "LLAMA3_2", "LLAMA2"),
    config_name="llama",
    build=llama,
    build_lora=lora_llama,
    arguments=_arguments,
    to_tune=_to_tune,
    to_hf=_to_hf,
    to_peft=_to_peft,
)
MISTRAL = replace(FAMILY, title="Mistral", model_types=("MISTRAL",), config_name="mistral")
