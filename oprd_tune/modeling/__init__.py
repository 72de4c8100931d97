"""Tools for torchtune decoders: building, loading, taps, heads, layer pairs, sharding, adapters and bridges."""

from oprd_tune.modeling.bridge import BridgePlan
from oprd_tune.modeling.families.qwen3 import (
    lora_qwen3_0_6b,
    lora_qwen3_1_7b,
    lora_qwen3_4b,
    lora_qwen3_8b,
    lora_qwen3_14b,
    lora_qwen3_32b,
    qwen3_0_6b,
    qwen3_1_7b,
    qwen3_4b,
    qwen3_8b,
    qwen3_14b,
    qwen3_32b,
)
from oprd_tune.modeling.from_folder import decoder
from oprd_tune.modeling.weights import hugging_face_checkpointer

__all__ = [
    "BridgePlan",
    "decoder",
    "hugging_face_checkpointer",
    "lora_qwen3_0_6b",
    "lora_qwen3_1_7b",
    "lora_qwen3_4b",
    "lora_qwen3_8b",
    "lora_qwen3_14b",
    "lora_qwen3_32b",
    "qwen3_0_6b",
    "qwen3_1_7b",
    "qwen3_4b",
    "qwen3_8b",
    "qwen3_14b",
    "qwen3_32b",
]
