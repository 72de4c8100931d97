"""The numbers that decide what a decoder computes: as `config.json` states them, and as a model was built.

Shapes tell a wrong builder by themselves. Most of these numbers do not change a shape, so a wrong one is silent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear

_ACTIVATIONS = {nn.SiLU: "silu", nn.GELU: "gelu", nn.ReLU: "relu"}
# Other architectures have these. None of the families here computes them, so a config that asks for one is refused.
_NEVER = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logit_scale": None,
    "logits_scaling": None,
    "attention_multiplier": None,
    "embedding_multiplier": None,
    "residual_multiplier": None,
    "query_pre_attn_scalar": None,
    "partial_rotary_factor": 1.0,
}
Numbers = dict[str, Any]


def stated_numbers(config: Any) -> Numbers:
    """What transformers would compute, by the names of `config.json`. `config` is transformers' config object."""
    rope = dict(config.rope_parameters or {})
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": {"swish": "silu"}.get(config.hidden_act, config.hidden_act),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": getattr(config, "attention_bias", config.model_type == "qwen2"),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "sliding_window": _window(config),
        "rope_theta": rope.pop("rope_theta", None),
        "rope_scaling": _scaling(rope),
        **{name: getattr(config, name, usual) for name, usual in _NEVER.items()},
    }


def built_numbers(model: TransformerDecoder) -> Numbers:
    """The same numbers, read off a torchtune decoder. If its blocks differ in one, that one is a list."""
    blocks = [_block_numbers(block) for block in model.layers]
    eps = [model.norm.eps, *(eps for block in blocks for eps in block.pop("rms_norm_eps"))]
    return {
        "num_hidden_layers": len(blocks),
        "hidden_size": model.tok_embeddings.embedding_dim,
        "vocab_size": model.tok_embeddings.num_embeddings,
        "rms_norm_eps": _only(eps),
        "tie_word_embeddings": isinstance(model.output, TiedLinear),
        **{name: _only(block[name] for block in blocks) for name in blocks[0]},
        **_NEVER,
    }


def differences(stated: Numbers, built: Numbers) -> list[str]:
    """What differs, one text each, such as `rms_norm_eps is 1e-05 in config.json and 1e-06 in the model`."""
    return [
        f"{name} is {value} in config.json and {built[name]} in the model"
        for name, value in stated.items()
        if built[name] != value
    ]


def _block_numbers(block: Any) -> Numbers:
    attn, mlp = block.attn, block.mlp
    rope, activation = attn.pos_embeddings, type(mlp.activation)
    queries = getattr(attn.q_proj, "linear", attn.q_proj)
    return {
        "rms_norm_eps": [block.sa_norm.eps, block.mlp_norm.eps],
        "intermediate_size": mlp.w1.weight.shape[0],
        "num_attention_heads": attn.num_heads,
        "num_key_value_heads": attn.num_kv_heads,
        "head_dim": attn.head_dim,
        "hidden_act": _ACTIVATIONS.get(activation, activation.__name__),
        "attention_bias": _has_bias(queries),
        "mlp_bias": _has_bias(mlp.w1),
        "sliding_window": getattr(attn, "sliding_window_size", None),
        "rope_theta": rope.base,
        "rope_scaling": _built_scaling(rope),
    }


def _built_scaling(rope: Any) -> Mapping[str, Any] | None:
    if not hasattr(rope, "scale_factor"):
        return None
    return {
        "rope_type": "llama3",
        "factor": rope.scale_factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.old_context_len,
    }


def _window(config: Any) -> int | None:
    """The width of the attention's window in tokens; None if each token sees all earlier ones."""
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    return getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None


def _scaling(rope: Mapping[str, Any]) -> Mapping[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    nested = any(isinstance(value, Mapping) for value in rope.values())
    return None if kind == "default" and not nested else dict(rope)


def _has_bias(linear: object) -> bool:
    return getattr(linear, "bias", None) is not None


def _only(values: Iterable[Any]) -> Any:
    """The value that all have in common; the list of values if they differ."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found[0] if len(found) == 1 else found
