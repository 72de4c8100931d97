"""Model families: their builders, and their names here and in Hugging Face folders.

A family is one file that defines `FAMILY`, and an entry in `FAMILIES`. CONTRIBUTING.md has the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.families import llama, qwen2, qwen3
from oprd_tune.modeling.families.family import Family

# By `model_type` in config.json. A test shows for each that a model computes what transformers does.
FAMILIES: Mapping[str, Family] = {f.config_name: f for f in (qwen2.FAMILY, qwen3.FAMILY, llama.FAMILY, llama.MISTRAL)}

# torchtune's checkpointers look these up in config.json without a default.
STATED = {"tie_word_embeddings", "num_key_value_heads"}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model folder.

    Args:
        config: the content of the folder's `config.json`.

    Raises:
        ConfigError: if no test shows that torchtune's model computes what transformers does, or if the weights are
            quantised.
    """
    says = str(config.get("model_type"))
    if says not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(
            f"config.json says model_type {says}; tests show equal outputs for {known} alone. A teacher of another "
            "architecture is loaded by transformers: docs/models.md"
        )
    if (quantisation := config.get("quantization_config")) is not None:
        method = quantisation.get("quant_method", "an unknown method")
        raise ConfigError(
            f"the weights are quantised ({method}). A student trains in full precision: give the folder that it was "
            "quantised from. A quantised teacher is loaded by transformers: docs/models.md"
        )
    return FAMILIES[says]


def transformers_config(folder: Path) -> Any:
    """transformers' config object of a model folder. It has the defaults for all that `config.json` leaves out."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its validation raises many kinds
        raise ConfigError(f"transformers cannot read {folder}/config.json: {error}") from error


__all__ = ["FAMILIES", "STATED", "Family", "family_of", "transformers_config"]
