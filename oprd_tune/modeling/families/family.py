"""What the library knows of a model family: its builders, and its names in Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtune.models.convert_weights import tune_to_peft_adapter_weights
from torchtune.modules import TransformerDecoder
from torchtune.training import FullModelHFCheckpointer

Config = Mapping[str, Any]  # the content of a config.json
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A model family, its builders, and the conversions between its parameter names.

    The conversions also take the content of `config.json`. They work on a part of a model, and on the meta device.

    Attributes:
        title: the family's name in messages.
        model_types: the checkpointer's names of the architecture, the usual one first.
        config_name: the family's `model_type` in config.json.
        build: builds the decoder.
        build_lora: builds it with adapters.
        arguments: the builder's arguments, from transformers' config object.
        to_tune: renames Hugging Face's parameters to ours. A head that repeats the embedding is left out.
        to_hf: renames our parameters to Hugging Face's, including an untied head.
        to_peft: renames adapters to PEFT's names.
        checkpointer: called with a folder, its weight files and an output folder; None if torchtune has its own.
    """

    title: str
    model_types: tuple[str, ...]
    config_name: str
    build: Callable[..., TransformerDecoder]
    build_lora: Callable[..., TransformerDecoder]
    arguments: Callable[[Any], dict[str, Any]]
    to_tune: Callable[[Weights, Config], dict[str, Tensor]]
    to_hf: Callable[[Weights, Config], dict[str, Tensor]]
    to_peft: Callable[[Weights, Config], dict[str, Tensor]]
    checkpointer: Callable[[str, list[str], str], FullModelHFCheckpointer] | None = None


def shape_arguments(config: Any) -> dict[str, Any]:
    """The arguments that all builders take, from transformers' config object."""
    return {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "embed_dim": config.hidden_size,
        "intermediate_dim": config.intermediate_size,
        "max_seq_len": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "rope_base": config.rope_parameters["rope_theta"],
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def peft_names(adapters: Weights) -> dict[str, Tensor]:
    """Adapters under PEFT's names, with unchanged values.

    torchtune reorders the rows of queries and keys, which only Llama and its relatives need. If each head is said to
    have two rows, the reordering changes nothing.
    """
    converted: dict[str, Tensor] = {}
    for key, value in adapters.items():
        heads = len(value) // 2
        converted |= tune_to_peft_adapter_weights({key: value}, num_heads=heads, num_kv_heads=heads, head_dim=2)
    return converted
