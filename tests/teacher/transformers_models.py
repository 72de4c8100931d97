"""Tiny random models of many families, as transformers saves them."""

import torch

VOCAB, DEPTH = 61, 3
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
_HEADS = {"head_dim": 8}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 4.0],
    "original_max_position_embeddings": 32,
}
# By name: transformers' config class, and what it gets beside the shape.
FAMILIES = {
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {**_HEADS, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_HEADS, **_MOE}),
    "llama": ("LlamaConfig", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {**_HEADS, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**_HEADS, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "mistral": ("MistralConfig", {**_HEADS, "sliding_window": 4}),
    "phi3": ("Phi3Config", {}),
    "phi4_mini": (
        "Phi3Config",
        {"rope_parameters": _LONGROPE, "tie_word_embeddings": True, "original_max_position_embeddings": 32},
    ),
    "gpt_oss": ("GptOssConfig", {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "olmo3": ("Olmo3Config", {"sliding_window": 4}),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0, "residual_multiplier": 0.5}),
    "bloom": ("BloomConfig", {}),  # no rotations; its blocks return several values
    "gpt2": ("GPT2Config", {}),  # learned positions beside the embedding
    "glm4": ("Glm4Config", {**_HEADS, "partial_rotary_factor": 0.5}),
}


def save_model(folder, family, seed=0, **changes):
    """Save a random model of a family; returns transformers' own model, in fp32 and for evaluation."""
    import transformers

    kind, arguments = FAMILIES[family]
    config = getattr(transformers, kind)(**{**SHAPE, **arguments, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start out trivial
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model
