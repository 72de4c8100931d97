"""Writes a Hugging Face folder with random bf16 weights and a tokenizer of digits.

    python benchmarks/random_models.py 1.5b FOLDER

The weights are drawn on a GPU where there is one; a CPU takes a minute for each ten gigabytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torchtune.models import qwen2_5
from torchtune.modules.tied_linear import TiedLinear

from oprd_tune.modeling.families import FAMILIES
from oprd_tune.modeling.weights import Builder, build_on_meta
from oprd_tune.tiny.model import write_tokenizer

# Builders, and into how many files their weights go.
SHAPES = {"1.5b": (qwen2_5.qwen2_5_1_5b_base, 1), "7b": (qwen2_5.qwen2_5_7b_instruct, 8)}


def config_of(model: Any) -> dict[str, Any]:
    """The config.json of a Qwen2, Qwen3 or Llama."""
    attention, embedding = model.layers[0].attn, model.tok_embeddings
    queries = attention.q_proj
    kind = "qwen3" if hasattr(queries, "norm") else "llama" if queries.bias is None else "qwen2"
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "head_dim": attention.head_dim,
        "vocab_size": embedding.num_embeddings,
        "hidden_size": embedding.embedding_dim,
        "intermediate_size": model.layers[0].mlp.w1.weight.shape[0],
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm.eps,
        "rope_theta": attention.pos_embeddings.base,
        "tie_word_embeddings": isinstance(model.output, TiedLinear),
        "torch_dtype": "bfloat16",
    }


def write_model(
    folder: Path, build: Builder, *, blocks: int | None = None, seed: int | None = None, files: int = 1
) -> None:
    """Write config.json and tokenizer and, with a seed, one file of weights after the other.

    `blocks` cuts the model.
    """
    folder.mkdir(parents=True)
    model = build_on_meta(build)
    model.layers = model.layers[:blocks]
    config = config_of(model)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    if seed is None:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    to_hf, parameters = FAMILIES[config["model_type"]].to_hf, dict(model.named_parameters())
    names, weight_map = sorted(parameters), {}
    for i in range(files):
        weights = {}
        for name in names[i::files]:
            value = torch.empty(parameters[name].shape, dtype=torch.bfloat16, device=device)
            value.normal_(0, 0.02, generator=generator)
            weights[name] = (value + 1 if name.endswith("scale") else value).cpu()
        weights = {key: value.contiguous() for key, value in to_hf(weights, config).items()}
        file = "model.safetensors" if files == 1 else f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file(weights, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, file)
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build, files = SHAPES[args.shape]
    write_model(args.folder, build, seed=args.seed, files=files)
