"""The names of a model family here and in Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torchtune.training import FullModelHFCheckpointer


@dataclass(frozen=True)
class Family:
    """A model family and the conversions between its parameter names.

    Attributes:
        title: the family's name in messages.
        config_name: the family's `model_type` in config.json.
        to_tune: renames some or all of Hugging Face's parameters to ours, given the keyword `tie_word_embeddings`.
        to_hf: renames our parameters to Hugging Face's, including an untied head.
        checkpointer: called with a folder, its weight files and an output folder; None if torchtune has its own.
    """

    title: str
    config_name: str
    to_tune: Callable[..., dict[str, Tensor]]
    to_hf: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    checkpointer: Callable[[str, list[str], str], FullModelHFCheckpointer] | None = None
