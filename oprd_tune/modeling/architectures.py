"""What is called differently here and in Hugging Face folders, by architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torchtune.models.convert_weights import get_mapped_key
from torchtune.models.qwen2 import _convert_weights as qwen2
from torchtune.training import FullModelHFCheckpointer

_HEAD = "lm_head.weight"
_QWEN3: dict[str, str] = {
    **{theirs: ours for theirs, ours in qwen2._FROM_HF.items() if ours and not ours.endswith(".bias")},
    **{f"model.layers.{{}}.self_attn.{x}_proj.weight": f"layers.{{}}.attn.{x}_proj.linear.weight" for x in "qk"},
    **{f"model.layers.{{}}.self_attn.{x}_norm.weight": f"layers.{{}}.attn.{x}_proj.norm.scale" for x in "qk"},
}
_QWEN3_BACK = {ours: theirs for theirs, ours in _QWEN3.items()}


def qwen3_hf_to_tune(
    state_dict: Mapping[str, Tensor], tie_word_embeddings: bool = False, **sizes: Any
) -> dict[str, Tensor]:
    """Hugging Face's names to those of `oprd_tune.modeling.qwen3`; the tensors stay as they are.

    Args:
        state_dict: of a whole model or a part of it.
        tie_word_embeddings: leave the head out, which then repeats the embedding.
        sizes: what torchtune's conversions also take; none are needed.

    Raises:
        Exception: as in torchtune, for a name that Qwen3 does not have.
    """
    kept = (key for key in state_dict if not (tie_word_embeddings and key == _HEAD))
    return {get_mapped_key(key, _QWEN3): state_dict[key] for key in kept}


def qwen3_tune_to_hf(state_dict: Mapping[str, Tensor], **sizes: Any) -> dict[str, Tensor]:
    """The inverse of `qwen3_hf_to_tune`; a tied head stays left out."""
    return {get_mapped_key(key, _QWEN3_BACK): value for key, value in state_dict.items()}


class Qwen3HFCheckpointer(FullModelHFCheckpointer):
    """torchtune's checkpointer for Qwen3, which torchtune does not know: as for Qwen2, under other names.

    Args:
        checkpoint_dir: see `FullModelHFCheckpointer`, as for all arguments.
    """

    architecture = "QWEN3"

    def __init__(self, checkpoint_dir: str, checkpoint_files: list[str], output_dir: str, **kwargs: Any) -> None:
        super().__init__(checkpoint_dir, checkpoint_files, "QWEN2", output_dir, **kwargs)

    def load_checkpoint(self) -> dict[str, Any]:
        """As torchtune's; a tied head, of which some folders have a file of its own, is not written again."""
        with _qwen3_for_qwen2():
            loaded = super().load_checkpoint()
        if self._config["tie_word_embeddings"]:
            self._weight_map.pop(_HEAD, None)
        return loaded

    def save_checkpoint(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As torchtune's."""
        with _qwen3_for_qwen2():
            super().save_checkpoint(state_dict, *args, **kwargs)


@contextmanager
def _qwen3_for_qwen2() -> Iterator[None]:
    """Within the scope, torchtune's checkpointer, which imports Qwen2's conversions as it calls them, finds Qwen3's."""
    kept = qwen2.qwen2_hf_to_tune, qwen2.qwen2_tune_to_hf
    qwen2.qwen2_hf_to_tune, qwen2.qwen2_tune_to_hf = qwen3_hf_to_tune, qwen3_tune_to_hf
    try:
        yield
    finally:
        qwen2.qwen2_hf_to_tune, qwen2.qwen2_tune_to_hf = kept


@dataclass(frozen=True)
class Architecture:
    """Names that a folder uses.

    Attributes:
        title: for messages.
        config_name: `model_type` in config.json.
        to_tune: Hugging Face's names to ours, given `tie_word_embeddings`. It only renames, so takes parts too.
        to_hf: our names to Hugging Face's, an untied head included.
    """

    title: str
    config_name: str
    to_tune: Callable[..., dict[str, Tensor]]
    to_hf: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


_QWEN2_SIZES = {"num_heads": 1, "num_kv_heads": 1, "dim": 1}  # asked for, not used
ARCHITECTURES: Mapping[str, Architecture] = {
    "QWEN2": Architecture(
        "Qwen2",
        "qwen2",
        partial(qwen2.qwen2_hf_to_tune, **_QWEN2_SIZES),
        partial(qwen2.qwen2_tune_to_hf, **_QWEN2_SIZES),
    ),
    "QWEN3": Architecture("Qwen3", "qwen3", qwen3_hf_to_tune, qwen3_tune_to_hf),
}


def model_type_of(files: FullModelHFCheckpointer) -> str:
    """A checkpointer's `model_type`, as configs say it."""
    return getattr(files, "architecture", files._model_type.name)
