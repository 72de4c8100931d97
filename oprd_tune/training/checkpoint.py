"""The folder of a run: checkpoints that survive a crash in the middle of a save, and Hugging Face exports.

    OUTPUT_DIR/config.yaml            the config, overrides included
    OUTPUT_DIR/checkpoints/step_…/    model and optimizer (torch.distributed.checkpoint), and state.pt
    OUTPUT_DIR/best/, final/          Hugging Face folders
    OUTPUT_DIR/summary.json, accuracy.png, tensorboard/

Folders are written beside their place and then renamed into it, so each one that exists is complete.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.optim import Optimizer
from torchtune import config
from torchtune.training import MODEL_KEY, FullModelHFCheckpointer

from oprd_tune.errors import ConfigError
from oprd_tune.settings import differences

_STAGED = ".staged-"
_REPLACED = ".replaced-"
CheckpointerFactory = Callable[..., FullModelHFCheckpointer]


class RunFolder:
    """Saves and finds a run's checkpoints.

    Args:
        output_dir: the run's folder.
        keep: how many checkpoints stay; older ones are removed once a newer one is complete.
    """

    def __init__(self, output_dir: str, keep: int) -> None:
        self.path = Path(output_dir)
        self._checkpoints = self.path / "checkpoints"
        self._keep = keep

    def check(self, cfg: DictConfig, *, resume: bool) -> Path | None:
        """Find out, before anything is loaded, whether the run may start here; returns the checkpoint to resume from.

        Raises:
            ConfigError: if the folder is another run's and `resume` is false, or the checkpoint's config differs.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output_dir {self.path} cannot be used: {error}") from error
        if not resume:
            if self.latest() is not None:
                raise ConfigError(
                    f"output_dir {self.path} holds another run; continue it with resume=true, or give another folder"
                )
            return None
        latest = self.latest()
        if latest is None:
            print(f"resume: {self.path} has no checkpoint yet, so the run starts at step 0")
            return None
        saved = OmegaConf.load(latest / "config.yaml")
        changed = differences(_plain(saved), _plain(cfg))
        if changed:
            raise ConfigError(
                f"resume: {latest} was written under another config: {'; '.join(changed)}. Only max_steps, output_dir "
                "and logging may change"
            )
        return latest

    def open(self, cfg: DictConfig) -> None:
        """Make the folder this run's, and remove what an interrupted save left behind."""
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in (*self.path.glob(f"{_STAGED}*"), *self._checkpoints.glob(f"{_STAGED}*")):
            shutil.rmtree(leftover)
        OmegaConf.save(cfg, self.path / "config.yaml")

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return max(self._checkpoints.glob("step_*"), default=None)

    def save(
        self, step: int, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], cfg: DictConfig
    ) -> None:
        """Write the checkpoint of `step`, then remove those beyond `keep`."""
        target = self._checkpoints / f"step_{step:08d}"
        if target.exists():
            return
        with _staged(target) as folder:
            weights, moments = get_state_dict(model, optimizer)
            with _quiet():
                save_tensors({"model": weights, "optimizer": moments}, checkpoint_id=folder, no_dist=True)
            OmegaConf.save(cfg, folder / "config.yaml")
            with open(folder / "state.pt", "wb") as file:
                torch.save({**state, "rng": _rng_state()}, file)
                file.flush()
                os.fsync(file.fileno())
        for old in sorted(self._checkpoints.glob("step_*"))[: -self._keep]:
            doomed = old.with_name(_STAGED + old.name)  # so that a crash leaves no half-removed checkpoint
            os.replace(old, doomed)
            shutil.rmtree(doomed)

    def export(self, name: str, model: nn.Module, make_checkpointer: CheckpointerFactory) -> Path:
        """Write the model as a Hugging Face folder, OUTPUT_DIR/`name`."""
        return export_model(get_model_state_dict(model), make_checkpointer, self.path / name)


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Fill model and optimizer from a checkpoint; returns the rest of its state. Call `restore_rng` when all is set up.

    Args:
        checkpoint: a folder that `RunFolder.save` wrote.
        model: the student, wrapped as it trains.
        optimizer: over its trainable parameters.
    """
    weights, moments = get_state_dict(model, optimizer)
    saved: dict[str, Any] = {"model": weights, "optimizer": moments}
    with _quiet():
        load_tensors(saved, checkpoint_id=checkpoint, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    return torch.load(checkpoint / "state.pt", weights_only=True)


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set every random number generator to where the checkpoint left it."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _rng_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def export_model(weights: Mapping[str, Any], make_checkpointer: CheckpointerFactory, target: Path) -> Path:
    """Write weights in torchtune's names as a Hugging Face folder, config and tokenizer files included.

    Args:
        weights: a full state dict.
        make_checkpointer: constructs the checkpointer that the model was loaded with, given `output_dir`.
        target: the folder; an older one of that name is replaced once the new one is complete.
    """
    with _staged(target) as folder, _quiet():
        checkpointer = make_checkpointer(output_dir=str(folder / "export"))
        checkpointer.load_checkpoint()  # it writes the files and names that it has read
        copies = {key: value.detach().cpu().contiguous().clone() for key, value in weights.items()}
        checkpointer.save_checkpoint({MODEL_KEY: copies}, epoch=0)
        for file in (folder / "export" / "epoch_0").iterdir():
            file.rename(folder / file.name)
        shutil.rmtree(folder / "export")
    return target


def export_checkpoint(checkpoint: str, target: str) -> Path:
    """Write a training checkpoint as a Hugging Face folder that transformers and vLLM load.

    Args:
        checkpoint: a `checkpoints/step_…` folder.
        target: the folder to write.

    Raises:
        ConfigError: if `checkpoint` is none, or `target` exists.
    """
    folder = Path(checkpoint)
    if not (folder / "state.pt").is_file():
        raise ConfigError(f"{folder} is no checkpoint; give a folder OUTPUT_DIR/checkpoints/step_…")
    if Path(target).exists():
        raise ConfigError(f"{target} exists already; give a folder that does not")
    cfg = OmegaConf.load(folder / "config.yaml")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[cfg.get("dtype", "bf16")]
    weights = {"model": get_model_state_dict(config.instantiate(cfg.model).to(dtype))}
    with _quiet():
        load_tensors(weights, checkpoint_id=folder, no_dist=True)
    return export_model(weights["model"], lambda **kwargs: config.instantiate(cfg.checkpointer, **kwargs), Path(target))


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `target` once it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged, replaced = target.with_name(_STAGED + target.name), target.with_name(_REPLACED + target.name)
    for leftover in (staged, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    staged.mkdir()
    yield staged
    if target.exists():
        os.replace(target, replaced)
    os.replace(staged, target)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's remarks about file sizes and single-process use."""
    previous = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _plain(cfg: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(cfg, resolve=False)
