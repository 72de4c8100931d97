"""The private parts of torchtune 0.6.1 that this package uses. No other file touches them.

0.6.1 is torchtune's last release, so these parts will not move. If you port them, this has to hold:

- `config._utils._get_component_from_path` turns a dotted path into an object, or raises `InstantiationError`.
- `_recipe_registry` lists recipes and configs. `tune` joins their paths to its own folder; an absolute path wins there.
- `_cli.tune.main` is the command line.
- A Hugging Face checkpointer keeps `_checkpoint_dir`, `_checkpoint_paths`, `_config` (config.json) and `_model_type`.
  It has `_weight_map` after loading. It imports Qwen2's conversions while it loads and saves.
- `models.qwen2._convert_weights` renames Qwen2's parameters; `models.qwen2._positional_embeddings` rotates.
- `models.llama3_1._position_embeddings` rotates with scaled frequencies. On the meta device it has no tables yet.
- A decoder applies `model.output` to its final states. A tied head is a plain attribute, an untied one a submodule.
- `MultiHeadAttention._attention_call` gets queries, keys and values, [B, H, S, size of a head], and `mask` as it is.
- `DoRALinear._get_weight_norm` gives ‖W + s B A‖ by row; `_quantize_base` tells a quantised base.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torchtune
from torch import Tensor, nn
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.qwen2 import _convert_weights as _qwen2
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune, qwen2_tune_to_hf
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import MultiHeadAttention, TransformerDecoder
from torchtune.modules.peft import DoRALinear, LoRALinear
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.protocols import TeacherFiles

__all__ = ["Llama3ScaledRoPE", "Qwen2RotaryPositionalEmbeddings", "qwen2_hf_to_tune", "qwen2_tune_to_hf"]

QWEN2_NAMES: Mapping[str, str] = {theirs: ours for theirs, ours in _qwen2._FROM_HF.items() if ours}


def component_at(path: str) -> Any:
    """The object that a dotted path names; raises ValueError if there is none."""
    try:
        return _get_component_from_path(path)
    except InstantiationError as error:
        raise ValueError(str(error)) from error


def recipe_registry() -> ModuleType:
    """The module where `tune` looks up recipes and configs."""
    from torchtune import _recipe_registry

    return _recipe_registry


def recipe_of_running_config() -> str | None:
    """The recipe, torchtune's or ours, that ships the config on this process's command line; None if no recipe does."""
    if "--config" not in sys.argv[:-1]:
        return None
    running = Path(sys.argv[sys.argv.index("--config") + 1]).resolve()
    folder = Path(torchtune.__file__).parent.parent / "recipes" / "configs"
    for recipe in recipe_registry().get_all_recipes():
        if any((folder / config.file_path).resolve() == running for config in recipe.configs):
            return recipe.name
    return None


def run_tune() -> None:
    """Run torchtune's command line."""
    from torchtune._cli.tune import main

    main()


def folder_of(files: FullModelHFCheckpointer | TeacherFiles) -> Path:
    """The folder that a checkpointer reads from."""
    if isinstance(files, TeacherFiles):
        return files.folder
    return Path(files._checkpoint_dir)


def weight_files_of(files: FullModelHFCheckpointer | TeacherFiles) -> list[Path]:
    """A checkpointer's weight files."""
    if isinstance(files, TeacherFiles):
        return files.weight_files
    return [Path(path) for path in files._checkpoint_paths]


def config_of(files: FullModelHFCheckpointer) -> Mapping[str, Any]:
    """The content of a checkpointer's `config.json`."""
    return files._config


def model_type_of(files: FullModelHFCheckpointer) -> str:
    """A checkpointer's `model_type` as configs spell it; our own name if torchtune does not know the architecture."""
    return getattr(files, "architecture", files._model_type.name)


def forget_weight(files: FullModelHFCheckpointer, name: str) -> None:
    """Leave a loaded weight out when the checkpointer saves."""
    files._weight_map.pop(name, None)


@contextmanager
def other_conversions_for_qwen2(to_tune: Callable[..., Any], to_hf: Callable[..., Any]) -> Iterator[None]:
    """Within the scope, a checkpointer for Qwen2 renames weights with these functions."""
    kept = _qwen2.qwen2_hf_to_tune, _qwen2.qwen2_tune_to_hf
    _qwen2.qwen2_hf_to_tune, _qwen2.qwen2_tune_to_hf = to_tune, to_hf
    try:
        yield
    finally:
        _qwen2.qwen2_hf_to_tune, _qwen2.qwen2_tune_to_hf = kept


def compile_backend() -> str:
    """The backend of `torch.compile`, which torchtune's users choose by a variable."""
    return os.environ.get("TORCH_COMPILE_BACKEND", "inductor")


def set_output(model: TransformerDecoder, output: object) -> None:
    """Put a head, or an object in a head's place, into a decoder."""
    # A tied head is a plain attribute and an untied one a submodule. Neither can take the name while the other has it.
    model._modules.pop("output", None)
    model.__dict__.pop("output", None)
    model.output = output


def attention_call(attention: MultiHeadAttention) -> Callable[..., Tensor]:
    """What computes a block's attention from its queries, keys and values."""
    return attention._attention_call


def set_attention_call(attention: MultiHeadAttention, call: Callable[..., Tensor]) -> None:
    """Let a block compute its attention by `call`."""
    attention._attention_call = call


def dora_weight_norm(linear: DoRALinear, weight: Tensor, change: Tensor) -> Tensor:
    """‖W + s B A‖ by row, [out]."""
    return linear._get_weight_norm(weight, change)


def has_quantised_base(linear: LoRALinear | DoRALinear) -> bool:
    """Whether the weights below an adapter are quantised."""
    return linear._quantize_base


def start_rotations(module: nn.Module) -> None:
    """Compute the tables of those rotary embeddings that are still on the meta device."""
    part: Any
    for part in module.modules():
        if hasattr(part, "rope_init") and (not [*part.buffers()] or any(buffer.is_meta for buffer in part.buffers())):
            part.rope_init()
