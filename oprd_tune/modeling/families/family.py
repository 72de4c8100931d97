"""What a model family is called here and in Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torchtune.training import FullModelHFCheckpointer


@dataclass(frozen=True)
class Family:
    """Names of a family's weights.

    Attributes:
        title: for messages.
        config_name: `model_type` in config.json.
        to_tune: Hugging Face's names to ours, given `tie_word_embeddings`. It only renames, so it takes parts too.
        to_hf: our names to Hugging Face's, an untied head included.
        checkpointer: called with a folder, its weight files and an output folder; None where torchtune's own knows the
            family.
    """

    title: str
    config_name: str
    to_tune: Callable[..., dict[str, Tensor]]
    to_hf: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    checkpointer: Callable[[str, list[str], str], FullModelHFCheckpointer] | None = None
