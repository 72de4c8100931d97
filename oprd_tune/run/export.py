"""Export students as Hugging Face folders, which transformers, vLLM and PEFT load."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torchtune.modules.peft import set_trainable_params
from torchtune.training import ADAPTER_CONFIG, ADAPTER_KEY, MODEL_KEY, FullModelHFCheckpointer

from oprd_tune.config.settings import DTYPES
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.adapters import adapter_config, adapter_names, adapter_state, merge_adapters
from oprd_tune.modeling.families import family_of
from oprd_tune.modeling.safe_reading import load_tensors, read_metadata
from oprd_tune.modeling.weights import build_on_meta, load_weights
from oprd_tune.run.manifest import check_whole
from oprd_tune.run.records import read_config
from oprd_tune.run.trusted import find_trusted
from oprd_tune.torchtune_compat import config_of, folder_of

STAGED = ".staged-"
_REPLACED = ".replaced-"
CheckpointerFactory = Callable[..., FullModelHFCheckpointer]


def export_model(
    weights: dict[str, Any],
    model: nn.Module,
    make_checkpointer: CheckpointerFactory,
    target: Path,
    *,
    dtype: torch.dtype,
) -> Path:
    """Write weights in torchtune's names as a Hugging Face folder, config and tokenizer files included.

    LoRA and DoRA adapters are merged into the weights. The folder `adapter` also holds them alone: `adapter_model.pt`
    for torchtune, and `adapter_model.safetensors` with `adapter_config.json` for PEFT. They must not lie beside the
    merged weights: if PEFT is installed, transformers would find them there and apply them a second time.

    Args:
        weights: a full state dict.
        model: the model of these weights; tells which of them are adapters.
        make_checkpointer: called with `output_dir`; constructs the checkpointer that the model was loaded with.
        target: the folder to write. An older folder of that name is replaced once the new one is complete.
        dtype: the dtype of the merged weights.
    """
    with staged(target) as folder, quiet():
        checkpointer = make_checkpointer(output_dir=str(folder / "export"))
        checkpointer.load_checkpoint()  # it can only write files and names that it has read
        state: dict[str, Any] = {}
        if adapter_names(model):
            state[ADAPTER_KEY] = adapter_state(weights)
            base = {"base_model_name_or_path": str(folder_of(checkpointer).resolve()), "task_type": "CAUSAL_LM"}
            state[ADAPTER_CONFIG] = adapter_config(model) | base
        adapters = dict(state.get(ADAPTER_KEY, {}))
        merged = merge_adapters(weights, model)
        state[MODEL_KEY] = {key: value.detach().to("cpu", dtype).contiguous() for key, value in merged.items()}
        checkpointer.save_checkpoint(state, epoch=0)
        written = folder / "export" / "epoch_0"
        if adapters:
            renamed = family_of(config_of(checkpointer)).to_peft(adapters, config_of(checkpointer))
            contiguous = {key: value.contiguous() for key, value in renamed.items()}
            save_file(contiguous, written / "adapter_model.safetensors", metadata={"format": "pt"})
        for file in written.iterdir():
            place = folder / "adapter" if file.name.startswith("adapter_") else folder
            place.mkdir(exist_ok=True)
            file.rename(place / file.name)
        shutil.rmtree(folder / "export")
        _state_dtype(folder / "config.json", dtype)
    return target


def _state_dtype(path: Path, dtype: torch.dtype) -> None:
    """Let a config.json say which dtype the weights have now."""
    config = json.loads(path.read_text())
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    config |= dict.fromkeys(keys, str(dtype).removeprefix("torch."))
    path.write_text(json.dumps(config, indent=2) + "\n")


def export_checkpoint(checkpoint: str, target: str, trust: Collection[str] = ()) -> Path:
    """Write a training checkpoint, a folder `checkpoints/step_…`, as the Hugging Face folder `target`.

    Nothing that lies in the checkpoint runs. Its config names the builder of the model and the reader of its weights;
    these must be ours or torchtune's.

    Args:
        checkpoint: the folder to read.
        target: the folder to write.
        trust: dotted paths of further components that the checkpoint's config may name.

    Raises:
        ConfigError: if `checkpoint` is not a whole checkpoint, names other components, or if `target` exists.
    """
    folder = Path(checkpoint)
    if not (folder / "state.pt").is_file():
        raise ConfigError(f"{folder} is no checkpoint; give a folder OUTPUT_DIR/checkpoints/step_…")
    if Path(target).exists():
        raise ConfigError(f"{target} exists already; give a folder that does not")
    check_whole(folder)
    record = read_config(folder)
    make_checkpointer = find_trusted("checkpointer", record.get("checkpointer"), trust)
    build = find_trusted("model", record.get("model"), trust)
    dtype = _dtype_of(record)
    saved = read_metadata(folder).state_dict_metadata
    with tempfile.TemporaryDirectory() as scratch, quiet():
        files = make_checkpointer(output_dir=scratch)
        model = build_on_meta(build)
        if adapters := adapter_names(model):
            set_trainable_params(model, adapters)
        trained = _dtype_of(record, trained=True)
        load_weights(model, files, dtype=dtype, device=torch.device("cpu"), trained_dtype=trained)
        weights = get_model_state_dict(model)
        own = {name: weight for name, weight in weights.items() if f"model.{name}" in saved}
        load_tensors({"model": own}, folder, no_dist=True)
        return export_model(weights, model, make_checkpointer, Path(target), dtype=dtype)


def _dtype_of(record: Mapping[str, Any], *, trained: bool = False) -> torch.dtype:
    """The dtype of a run's weights, or of those of them that it trained."""
    name = record.get("dtype", "bf16")
    if trained:
        name = record.get("master_dtype") or name
    if name not in DTYPES:
        raise ConfigError(f"the checkpoint's config.yaml gives the dtype {name!r}; allowed are {', '.join(DTYPES)}")
    return DTYPES[name]


def remove_leftovers(folder: Path) -> None:
    """Remove the folders that an interrupted write has left in a folder."""
    for leftover in folder.glob(f"{STAGED}*"):
        remove(leftover)


def remove(path: Path) -> None:
    """Remove a folder with its content, a file, or a link but not what it leads to; or nothing, if nothing is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Within the scope, a folder to fill. At the end of the scope it takes the place of `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged, replaced = target.with_name(STAGED + target.name), target.with_name(_REPLACED + target.name)
    remove(staged)
    with suppress(OSError):
        remove(replaced)
    if os.path.lexists(replaced):
        replaced = replaced.with_name(f"{replaced.name}-{os.getpid()}")
    staged.mkdir()
    try:
        yield staged
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)  # its space may be what the disk lacks
        raise
    if os.path.lexists(target):  # a link to a folder that is gone is in the way too
        os.replace(target, replaced)
    os.replace(staged, target)
    with suppress(OSError):  # someone may read it still, on a file system that then keeps it; the next write removes it
        remove(replaced)


@contextmanager
def quiet() -> Iterator[None]:
    """Within the scope, libraries do not print their remarks about file sizes and single-process use."""
    previous = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
