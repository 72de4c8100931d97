"""Qwen2 and Qwen2.5: torchtune has the builders and the conversions."""

from __future__ import annotations

from torchtune.models.qwen2 import lora_qwen2, qwen2

from oprd_tune.modeling.families.family import Family, peft_names, shape_arguments
from oprd_tune.torchtune_compat import qwen2_hf_to_tune, qwen2_tune_to_hf

_SIZES = {"num_heads": 1, "num_kv_heads": 1, "dim": 1}  # the conversions require these but do not use them
FAMILY = Family(
    title="Qwen2",
    model_types=("QWEN2",),
    config_name="qwen2",
    build=qwen2,
    build_lora=lora_qwen2,
    arguments=shape_arguments,
    to_tune=lambda weights, config: qwen2_hf_to_tune(
        weights, tie_word_embeddings=config["tie_word_embeddings"], **_SIZES
    ),
    to_hf=lambda weights, config: qwen2_tune_to_hf(weights, **_SIZES),
    to_peft=lambda adapters, config: peft_names(adapters),
)
