"""Reads any causal language model that transformers can load, from a folder, as a frozen teacher."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.finite import check_finite
from oprd_tune.modeling.folders import model_folder
from oprd_tune.modeling.weights import read_headers
from oprd_tune.teacher.block_placement import BlockPlacement, Placing
from oprd_tune.teacher.transformers_head import probe_head
from oprd_tune.teacher.transformers_model import TransformersDecoder
from oprd_tune.torchtune_compat import set_output

_SHOWN = 3
_REFUSALS = (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError, TypeError)


def transformers_teacher(path: str) -> TransformersDecoder:
    """A model folder's decoder on the meta device, as its `config.json` describes it: shapes without memory.

    For `teacher_model` in configs; `transformers_files` then loads the weights. transformers never runs code from the
    folder.

    Args:
        path: a Hugging Face model folder.

    Raises:
        ConfigError: if the folder has no `config.json`, or if transformers cannot build a causal language model from
            it without code of the folder's own.
    """
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"teacher_model.path: {folder} has no config.json; give a Hugging Face model folder")
    with _refused(folder):
        model = TransformersDecoder(_on_meta(folder))
    model.folder = folder
    if _is_quantised(_config_of(folder)):
        _, files = model_folder(path)
        model.published_block_bytes = _stored_bytes([folder / file for file in files], model)
    return model


def transformers_files(checkpoint_dir: str, output_dir: str, hub_name: str | None = None) -> TransformersFiles:
    """The weight files of a folder that transformers loads, for `teacher_checkpointer` in configs.

    Args:
        checkpoint_dir: a Hugging Face model folder with safetensors files.
        output_dir: not used, since a teacher is not saved; recipes set it.
        hub_name: the model's name on the hub, for the message that the folder is missing.

    Raises:
        ConfigError: if the folder or one of its files is missing.
    """
    folder, files = model_folder(checkpoint_dir, hub_name)
    return TransformersFiles(folder, [folder / file for file in files])


class TransformersFiles:
    """A folder that transformers loads; `oprd_tune.protocols.TeacherFiles` describes the members."""

    def __init__(self, folder: Path, weight_files: list[Path]) -> None:
        self.folder, self.weight_files = folder, weight_files

    def check_weights(self, name: str, model: nn.Module) -> None:
        """Compare the files with `teacher_model` as far as transformers keeps their names.

        Raises:
            ConfigError: if `teacher_model` is another model; if a file is damaged; if a block is missing; or if
                a weight has another shape.
        """
        if not isinstance(model, TransformersDecoder) or model.folder.resolve() != self.folder.resolve():
            raise ConfigError(
                f"{name} reads {self.folder}, but teacher_model is another model; give teacher_model: "
                f"{{_component_: oprd_tune.teacher.transformers_teacher, path: {self.folder}}}"
            )
        found, depth = read_headers(name, self.weight_files), len(model.layers)
        if lacking := sorted(set(range(depth)) - {_block_of(key, model) for key in found} - {None}):
            raise ConfigError(
                f"{name}: config.json says that there are {depth} blocks, but the files of {self.folder} have no "
                f"weight of block {', '.join(map(str, lacking[:_SHOWN]))}; fetch the folder again"
            )
        _tell_of_positions(self.folder, model.config)
        if model.published_block_bytes is not None:
            _check_can_run(self.folder)
            return  # quantised weights have other shapes
        for key, wanted in _on_meta(self.folder).state_dict().items():
            if key in found and found[key].shape != wanted.shape:
                raise ConfigError(
                    f"{name}: the checkpoint does not fit its config.json: {key} is {tuple(found[key].shape)}, but "
                    f"{tuple(wanted.shape)} is needed; fetch the folder again"
                )

    def load_teacher(
        self, *, dtype: torch.dtype, top: int | None, placing: Placing
    ) -> tuple[TransformersDecoder, dict[int, float]]:
        """Load the teacher up to layer `top`; None stands for all layers and the head.

        transformers first reads the blocks up to `top`, embedding, norm and head into this process's CPU memory. From
        there each block moves to the device, and is quantised, sharded or offloaded before the next one moves. So CPU
        memory holds all these blocks for a while, once for each process of a host.

        Raises:
            ConfigError: if transformers cannot load the folder, or if it finds no value for a weight.
        """
        config = _config_of(self.folder)
        depth, published = config.get_text_config().num_hidden_layers, _is_quantised(config)
        causal, unused = self._read(_cut(config, top), dtype, placing.device if published else None)
        with _refused(self.folder):
            model = TransformersDecoder(causal).requires_grad_(False).eval()
            if top is None:
                probe_head(model, causal)
        model.folder = self.folder
        if further := sorted(key for key in unused if (_block_of(key, model) or 0) < len(model.layers)):
            print(f"{self.folder}: {len(further)} weights are not the decoder's and not used: {further[0]}, …")
        if top is not None:
            set_output(model, nn.Identity())
            model.norm = model.norm if top >= depth else nn.Identity()
        blocks, model.layers = list(model.layers), nn.ModuleList()
        move = partial(_move, device=placing.device, published=published)
        move(model)
        place = BlockPlacement(model, len(blocks), partial(model.block_calls, blocks), placing)
        for number in range(1, len(blocks) + 1):
            model.layers.append(place(number, move(blocks[number - 1])))
        if placing.sharding is not None:
            placing.sharding.rest(model, whole_head=True)
        return model, place.errors

    def _read(self, config: Any, dtype: torch.dtype, device: torch.device | None) -> tuple[Any, list[str]]:
        """transformers' model with its weights, and the names of unused weights.

        It lies in CPU memory, or on the given device: a quantised checkpoint goes there at once.
        """
        where = {} if device is None or device.type == "cpu" else {"device_map": {"": device}}
        with _quiet(), _refused(self.folder):
            from transformers import AutoModelForCausalLM

            model, report = AutoModelForCausalLM.from_pretrained(
                self.folder,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                **where,
            )
        if _is_quantised(config) and not _is_quantised(model.config):
            raise ConfigError(
                f"{self.folder}: transformers can run this quantised checkpoint only as plain weights here, which are "
                'several times as large; write "dequantize": true into quantization_config of its config.json to '
                "have that, or give another teacher"
            )
        if missing := sorted(report["missing_keys"]):
            raise ConfigError(
                f"{self.folder} lacks {len(missing)} weights that its config.json asks for, such as "
                f"{', '.join(missing[:_SHOWN])}; they would be random. Fetch the folder again"
            )
        check_finite(model.named_parameters(), self.weight_files)
        return model, report["unexpected_keys"]


def _config_of(folder: Path) -> Any:
    with _quiet(), _refused(folder):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _on_meta(folder: Path) -> Any:
    config = _config_of(folder)
    with _quiet(), _refused(folder), torch.device("meta"):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _cut(config: Any, top: int | None) -> Any:
    """A config of the first `top` blocks alone. Lists with an entry for each block are cut too."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    if top is None or top >= depth:
        return config
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == depth and re.search("layer|block", name):
            setattr(text, name, value[:top])
    text.num_hidden_layers = top
    return config


def _is_quantised(config: Any) -> bool:
    """Whether the model stays as its checkpoint is quantised. `dequantize` in config.json restores plain weights."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return False
    return not (found.get("dequantize") if isinstance(found, dict) else getattr(found, "dequantize", False))


def _check_can_run(folder: Path) -> None:
    """Ask transformers whether this machine has what a quantised checkpoint needs, such as a package."""
    with _quiet(), _refused(folder):
        from transformers.quantizers import AutoHfQuantizer

        quantizer = AutoHfQuantizer.from_config(_config_of(folder).quantization_config, pre_quantized=True)
        quantizer.validate_environment(dtype=torch.bfloat16, device_map=None, weights_only=True)


def _tell_of_positions(folder: Path, config: Any) -> None:
    """Say so if a row's positions may depend on the other rows of its batch."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        print(
            f"{folder}: its positions are scaled by {rope['rope_type']}, so where the longest row of a batch has more "
            f"than {trained} tokens, the states of shorter rows change too."
        )


def _block_of(key: str, model: TransformersDecoder) -> int | None:
    """The index of the block that a weight's name in a file belongs to; None for weights outside of blocks."""
    match = re.search(rf"(?:^|\.){model.block_list}\.(\d+)\.", key)
    return None if match is None or "vision" in key else int(match[1])


def _stored_bytes(files: list[Path], model: TransformersDecoder) -> list[int]:
    """Bytes of each block in a quantised checkpoint, as its files hold them."""
    sizes = [0] * len(model.layers)
    for path in files:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for key, entry in header.items():
            block = _block_of(key, model)
            if block is not None and block < len(sizes):
                start, end = entry["data_offsets"]
                sizes[block] += end - start
    return sizes


def _move(module: nn.Module, *, device: torch.device, published: bool) -> nn.Module:
    """Move a module's parameters and buffers to the device. On a CPU they are copied: files may lie under them.

    Those of a quantised checkpoint are where transformers put them.
    """
    if published:
        return module
    module.to(device)
    if device.type == "cpu":
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
    return module


@contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """Within the scope, what transformers refuses is a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except _REFUSALS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{folder} needs code of its own (auto_map in config.json), which is never run here; give a model "
                "whose architecture transformers has"
            ) from error
        raise ConfigError(
            f"{folder}: transformers cannot load it as a causal language model ({reason}); give another teacher, or "
            "install what the message asks for"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the scope, transformers prints only errors, and no progress."""
    from transformers.utils import logging

    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
