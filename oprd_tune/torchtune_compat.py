"""Everything that this package uses of torchtune 0.6.1 without torchtune promising it. Nothing else touches such parts.

0.6.1 is torchtune's last release, so these will not move. If you port them, here is what has to hold:

- `config._utils._get_component_from_path` turns a dotted path into an object, or raises `InstantiationError`.
- `_recipe_registry` lists recipes and configs; `tune` joins their paths to its own folder, where absolute ones win.
- `_cli.tune.main` is the command line.
- A Hugging Face checkpointer keeps `_checkpoint_dir`, `_checkpoint_paths`, `_config` (config.json), `_model_type`, and,
  once it has loaded, `_weight_map`. It imports Qwen2's conversions while it loads and saves.
- `models.qwen2._convert_weights` renames Qwen2's parameters; `models.qwen2._positional_embeddings` rotates.
- A decoder applies `model.output` to its final states. A tied head is a plain attribute, an untied one a submodule.
- `DoRALinear._get_weight_norm` gives ‖W + s B A‖ by row; `_quantize_base` tells a quantised base.
"""

from __future__ import annotations

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
from torchtune.models.qwen2 import _convert_weights as _qwen2
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune, qwen2_tune_to_hf
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import DoRALinear, LoRALinear
from torchtune.training import FullModelHFCheckpointer

__all__ = ["Qwen2RotaryPositionalEmbeddings", "qwen2_hf_to_tune", "qwen2_tune_to_hf"]

QWEN2_NAMES: Mapping[str, str] = {theirs: ours for theirs, ours in _qwen2._FROM_HF.items() if ours}


def component_at(path: str) -> Any:
    """The object that a dotted path names.

    Raises:
        ValueError: if there is none.
    """
    try:
        return _get_component_from_path(path)
    except InstantiationError as error:
        raise ValueError(str(error)) from error


def recipe_registry() -> ModuleType:
    """The module that `tune` looks recipes and configs up in."""
    from torchtune import _recipe_registry

    return _recipe_registry


def recipe_of_running_config() -> str | None:
    """The recipe, torchtune's or ours, that the config on this process's command line is shipped with, if any."""
    if "--config" not in sys.argv[:-1]:
        return None
    running = Path(sys.argv[sys.argv.index("--config") + 1]).resolve()
    folder = Path(torchtune.__file__).parent.parent / "recipes" / "configs"
    for recipe in recipe_registry().get_all_recipes():
        if any((folder / config.file_path).resolve() == running for config in recipe.configs):
            return recipe.name
    return None


def run_tune() -> None:
    """torchtune's command line."""
    from torchtune._cli.tune import main

    main()


def folder_of(files: FullModelHFCheckpointer) -> Path:
    """The folder that a checkpointer reads."""
    return Path(files._checkpoint_dir)


def weight_files_of(files: FullModelHFCheckpointer) -> list[Path]:
    """Its weight files."""
    return [Path(path) for path in files._checkpoint_paths]


def config_of(files: FullModelHFCheckpointer) -> Mapping[str, Any]:
    """Its `config.json`."""
    return files._config


def model_type_of(files: FullModelHFCheckpointer) -> str:
    """Its `model_type`, as configs say it; ours for architectures that torchtune does not know."""
    return getattr(files, "architecture", files._model_type.name)


def forget_weight(files: FullModelHFCheckpointer, name: str) -> None:
    """Do not write a weight again that has been loaded."""
    files._weight_map.pop(name, None)


@contextmanager
def other_conversions_for_qwen2(to_tune: Callable[..., Any], to_hf: Callable[..., Any]) -> Iterator[None]:
    """Within the scope, a checkpointer for Qwen2 renames with these functions."""
    kept = _qwen2.qwen2_hf_to_tune, _qwen2.qwen2_tune_to_hf
    _qwen2.qwen2_hf_to_tune, _qwen2.qwen2_tune_to_hf = to_tune, to_hf
    try:
        yield
    finally:
        _qwen2.qwen2_hf_to_tune, _qwen2.qwen2_tune_to_hf = kept


def set_output(model: TransformerDecoder, output: object) -> None:
    """Put a head, or what stands in for one, into a decoder.

    A tied head is no nn.Module, so either kind has to leave before the other can take its name.
    """
    model._modules.pop("output", None)
    model.__dict__.pop("output", None)
    model.output = output


def dora_weight_norm(linear: DoRALinear, weight: Tensor, change: Tensor) -> Tensor:
    """‖W + s B A‖ by row, [out]."""
    return linear._get_weight_norm(weight, change)


def has_quantised_base(linear: LoRALinear | DoRALinear) -> bool:
    """Whether an adapter sits on quantised weights."""
    return linear._quantize_base


def start_rotations(module: nn.Module) -> None:
    """Compute the tables of rotary embeddings that are still on the meta device."""
    part: Any
    for part in module.modules():
        if hasattr(part, "rope_init") and any(buffer.is_meta for buffer in part.buffers()):
            part.rope_init()
