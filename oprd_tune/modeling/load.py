"""From a builder and a Hugging Face checkpoint to a decoder, with the mistakes found before weights are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune
from torchtune.modules import TransformerDecoder
from torchtune.training import MODEL_KEY, FullModelHFCheckpointer
from torchtune.training.checkpointing import ModelType

from oprd_tune.errors import ConfigError

Builder = Callable[[], TransformerDecoder]
_SHOWN = 4


def build_on_meta(build: Builder) -> TransformerDecoder:
    """The model without weights: its shapes cost nothing."""
    with torch.device("meta"):
        return build()


def width_of(model: TransformerDecoder) -> int:
    """Size of a hidden state."""
    return model.tok_embeddings.embedding_dim


def open_checkpointer(name: str, make: Callable[[], FullModelHFCheckpointer]) -> FullModelHFCheckpointer:
    """Construct a checkpointer, which looks at its folder but reads no weights.

    Args:
        name: its config key, for messages.
        make: constructs it.

    Raises:
        ConfigError: if the folder is missing or incomplete.
    """
    try:
        return make()
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{name}: the checkpoint folder is missing or incomplete: {error}. It needs config.json and every file of "
            "checkpoint_files; `tune download <hub name> --output-dir <folder>` fetches them"
        ) from error


def check_weights(name: str, checkpointer: FullModelHFCheckpointer, model: TransformerDecoder) -> None:
    """Compare the headers of a checkpoint's files with the model's parameters.

    Args:
        name: the checkpointer's config key, for messages.
        checkpointer: an opened checkpointer.
        model: the model on the meta device.

    Raises:
        ConfigError: if a file is damaged, or parameters are missing, unknown or of another shape.
    """
    found: dict[str, Any] = {}
    for path in map(Path, checkpointer._checkpoint_paths):
        if path.suffix != ".safetensors":
            return  # a pickle has no header to look at; loading is strict anyway
        try:
            with safe_open(path, framework="pt") as file:
                found |= {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{name}: {path} is damaged or incomplete ({error}); fetch it again") from error
    if checkpointer._model_type is ModelType.QWEN2:
        if "tie_word_embeddings" not in checkpointer._config:
            raise ConfigError(f"{name}: config.json does not say tie_word_embeddings; add it, true or false")
        try:
            converted = qwen2_hf_to_tune(found, tie_word_embeddings=checkpointer._config["tie_word_embeddings"])
        except Exception as error:  # torchtune raises the base class for a name that it does not know
            raise ConfigError(f"{name}: the checkpoint is not of the architecture Qwen2: {error}") from error
        _compare(name, converted, model.state_dict())


def _compare(name: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    problems = {
        "lacks": sorted(set(wanted) - set(found)),
        "has unknown": sorted(set(found) - set(wanted)),
        "has other shapes of": [
            f"{key} {tuple(found[key].shape)} for {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in found and found[key].shape != value.shape
        ],
    }
    parts = [
        f"{what} {', '.join(keys[:_SHOWN])}" + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
        for what, keys in problems.items()
        if keys
    ]
    if parts:
        raise ConfigError(f"{name}: the checkpoint does not fit the model's builder: it {'; it '.join(parts)}")


def load_decoder(
    build: Builder, checkpointer: FullModelHFCheckpointer, *, dtype: torch.dtype, device: torch.device
) -> TransformerDecoder:
    """Build a decoder and fill it; no second copy of the weights is made beyond one cast.

    Args:
        build: builds the model; called on the meta device.
        checkpointer: where its weights are.
        dtype: of the parameters.
        device: where they go.

    Raises:
        ConfigError: if the weights do not fit.
    """
    model = build_on_meta(build)
    weights = checkpointer.load_checkpoint()[MODEL_KEY]
    weights = {key: value.to(device=device, dtype=dtype) for key, value in weights.items()}
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"the checkpoint does not fit the model's builder: {error}") from error
    with device:
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    return model
