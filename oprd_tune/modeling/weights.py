"""Build decoders and load Hugging Face checkpoints into them. Mistakes are found before weights are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder
from torchtune.training import MODEL_KEY, FullModelHFCheckpointer
from torchtune.training.checkpointing import ModelType

from oprd_tune.config.components import Component
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.adapters import adapter_names, start_adapters
from oprd_tune.modeling.families import STATED, family_of, transformers_config
from oprd_tune.modeling.families.numbers import built_numbers, differences, stated_numbers
from oprd_tune.modeling.finite import check_finite
from oprd_tune.modeling.folders import model_folder, read_config, stored_shapes
from oprd_tune.modeling.from_folder import can_build
from oprd_tune.modeling.norms import fuse_norms
from oprd_tune.modeling.row_attention import take_rows
from oprd_tune.protocols import DecodesItself, TeacherFiles
from oprd_tune.torchtune_compat import config_of, folder_of, model_type_of, start_rotations, weight_files_of

Builder = Callable[[], TransformerDecoder]
_SHOWN = 4  # names listed in a message
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def build_on_meta(build: Builder) -> TransformerDecoder:
    """The model on the meta device: it has shapes, but takes no memory. Its norms are fused, and it takes packed rows.

    What is no module, as a wrong component's result, is returned as it is.
    """
    with torch.device("meta"):
        model = build()
    return take_rows(fuse_norms(model)) if isinstance(model, nn.Module) else model


def width_of(model: TransformerDecoder) -> int:
    """The size of a hidden state."""
    return model.tok_embeddings.embedding_dim


def hugging_face_checkpointer(
    checkpoint_dir: str, output_dir: str, hub_name: str | None = None, model_type: str | None = None
) -> FullModelHFCheckpointer:
    """torchtune's checkpointer for all weight files of a Hugging Face folder.

    Args:
        output_dir: where exports go; recipes set it.
        hub_name: the model's name on the hub, such as `Qwen/Qwen2.5-1.5B`, for the message that the folder is missing.
        model_type: torchtune's name of the architecture, or QWEN3; None for the one that `config.json` states.

    Raises:
        ConfigError: if the folder is none of a model that can be trained, or if one of its files is missing. The
            message then has the command that fetches them.
    """
    folder, files = model_folder(checkpoint_dir, hub_name)
    try:
        family = family_of(read_config(folder))
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    if model_type not in (None, *family.model_types):
        known = [kind.name for kind in ModelType] + ["QWEN3"]
        if model_type not in known:
            raise ConfigError(f"model_type is {model_type}; leave it out, or give one of {', '.join(sorted(known))}")
        raise ConfigError(f"model_type is {model_type}, but config.json says {family.config_name}; leave it out")
    if family.checkpointer is not None:
        return family.checkpointer(str(folder), files, output_dir)
    return FullModelHFCheckpointer(str(folder), files, model_type or family.model_types[0], output_dir)


def open_checkpointer(component: Component, output_dir: str) -> FullModelHFCheckpointer:
    """Construct a config's checkpointer; weights are not read yet. Raises ConfigError if its folder is incomplete."""
    name = component.name
    try:
        return component.plainly(output_dir=output_dir)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    except Exception as error:
        if isinstance(error, KeyError) and error.args[0] == "QWEN3":
            raise ConfigError(
                f"{name}: {error} is not known to torchtune's checkpointer; use "
                "oprd_tune.modeling.hugging_face_checkpointer"
            ) from error
        raise ConfigError(
            f"{name}: the checkpoint folder is missing or incomplete: {error}. It needs config.json and every file of "
            "checkpoint_files; `tune download <hub name> --output-dir <folder>` fetches them"
        ) from error


def check_weights(name: str, checkpointer: FullModelHFCheckpointer | TeacherFiles, model: TransformerDecoder) -> None:
    """Compare a checkpoint with a model on the meta device: what `config.json` states, and the headers of the files.

    `name` is the checkpointer's config key, for messages.

    Raises:
        ConfigError: if the model is not torchtune's; if no test shows that this architecture computes what transformers
            does; if a number that changes the outputs differs between `config.json` and the model; if a file is
            damaged; if parameters are missing, unknown or of another shape; or if a stored head differs from the
            embedding that it is tied to.
    """
    if isinstance(checkpointer, TeacherFiles):
        checkpointer.check_weights(name, model)
        return
    if isinstance(model, DecodesItself):
        raise ConfigError(
            f"{name} opens torchtune's checkpoints, but its model is transformers'; give {name}: "
            "{_component_: oprd_tune.teacher.transformers_files, checkpoint_dir: FOLDER}"
        )
    config, given = config_of(checkpointer), model_type_of(checkpointer)
    try:
        family = family_of(config)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    if given not in family.model_types:
        right = family.model_types[0]
        raise ConfigError(f"{name}.model_type is {given}, but config.json says {family.config_name}: {right}")
    if missing := sorted(STATED - config.keys()):
        raise ConfigError(f"{name}: config.json does not say {missing[0]}; add it, as its model's card states it")
    folder = folder_of(checkpointer)
    stated = stated_numbers(transformers_config(folder))
    if different := differences(stated, built_numbers(model)):
        what_to_do = "oprd_tune.modeling.decoder builds it with these numbers, or give them to the builder"
        if not can_build(folder):
            what_to_do = "No builder here can do that. As a teacher, transformers loads it: docs/models.md"
        raise ConfigError(f"{name}: config.json asks for another model: {'; '.join(different)}. {what_to_do}")
    files = weight_files_of(checkpointer)
    if any(path.suffix != ".safetensors" for path in files):
        return  # a pickle has no header; mistakes are found when it is loaded
    found = read_headers(name, files)
    try:
        converted = family.to_tune(found, config)
    except Exception as error:  # torchtune raises the base class for an unknown name
        raise ConfigError(f"{name}: the checkpoint is not of the architecture {family.title}: {error}") from error
    adapters = adapter_names(model)
    _compare(name, converted, {key: value for key, value in model.state_dict().items() if key not in adapters})
    if config["tie_word_embeddings"] and _HEAD in found:
        _check_tied_head(name, files)


def read_headers(name: str, files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files on the meta device, in float32; raises ConfigError if a file is damaged."""
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            found |= {key: torch.empty(shape, device="meta") for key, shape in stored_shapes(path).items()}
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    return found


def _check_tied_head(name: str, files: Sequence[Path]) -> None:
    """Raise ConfigError if a stored head is not the embedding: transformers would then use both."""
    stored: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            stored |= {key: file.get_tensor(key) for key in (_HEAD, _EMBEDDING) if key in file.keys()}  # noqa: SIM118
    if not torch.equal(stored[_HEAD], stored[_EMBEDDING]):
        raise ConfigError(
            f"{name}: config.json says tie_word_embeddings true, but {_HEAD} is stored and differs from "
            f"{_EMBEDDING}. If the head is right, say false there; if not, leave {_HEAD} out of the files"
        )


def _compare(name: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    problems = {
        "lack": sorted(set(wanted) - set(found)),
        "have unknown": sorted(set(found) - set(wanted)),
        "have other shapes of": [
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
        told = f"{name}: the weights do not fit the model of config.json: their files {'; '.join(parts)}"
        if "output.weight" in problems["lack"]:
            told += f". A model without a head of its own ({_HEAD}) says tie_word_embeddings true"
        if any(key.startswith("layers.") for key in problems["have unknown"]):
            told += ". num_hidden_layers may be too small"
        raise ConfigError(told)


def load_decoder(
    build: Builder, checkpointer: FullModelHFCheckpointer, *, dtype: torch.dtype, device: torch.device
) -> TransformerDecoder:
    """Build a decoder and load its weights. See `load_weights`."""
    model = build_on_meta(build)
    load_weights(model, checkpointer, dtype=dtype, device=device)
    return model


def load_weights(
    model: TransformerDecoder,
    checkpointer: FullModelHFCheckpointer,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trained_dtype: torch.dtype | None = None,
    on_block: Callable[[int, nn.Module], nn.Module] | None = None,
) -> None:
    """Load the weights of a decoder on the meta device: embedding, norm and head first, then block by block.

    The files are memory-mapped, and tensors are cast one at a time, so only one tensor exists beside the model. If
    `on_block` shards or quantises each block as soon as it is loaded, even the model is never whole in memory.

    Args:
        model: a decoder on the meta device. It may have fewer blocks than the checkpoint.
        dtype: dtype of the parameters.
        trained_dtype: dtype of the parameters that require a gradient; None for `dtype`.
        on_block: called with each block's number, from 1, and the loaded block. The block that it returns is used.

    Raises:
        ConfigError: if the weights do not fit, or if one is not finite.
    """
    weights, files = checkpointer.load_checkpoint()[MODEL_KEY], weight_files_of(checkpointer)
    fill = partial(_fill, files=files, dtype=dtype, trained_dtype=trained_dtype or dtype, device=device)
    blocks, model.layers = model.layers, nn.ModuleList()
    fill(model, weights)
    for number, block in enumerate(blocks, start=1):
        prefix = f"layers.{number - 1}."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        fill(block, own)
        model.layers.append(block if on_block is None else on_block(number, block))


def _fill(
    module: nn.Module,
    weights: dict[str, Tensor],
    *,
    files: Sequence[Path],
    dtype: torch.dtype,
    trained_dtype: torch.dtype,
    device: torch.device,
) -> None:
    adapters = adapter_names(module)
    loaded = {}
    for name, parameter in module.named_parameters():
        if name not in adapters:
            if name not in weights:
                raise ConfigError(f"the checkpoint does not fit the model's builder: it lacks {name}")
            wanted = trained_dtype if parameter.requires_grad else dtype
            # Always a copy, because a mapped file that is rewritten later would crash the run.
            loaded[name] = weights[name].to(device=device, dtype=wanted, copy=True)
    check_finite(loaded.items(), files)
    try:
        module.load_state_dict(loaded, strict=False, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"the checkpoint does not fit the model's builder: {error}") from error
    start_adapters(module, device=device, dtype=trained_dtype)
    with device:
        start_rotations(module)
