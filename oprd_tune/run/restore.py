"""Put a checkpoint back into a model, an optimizer and the generators of random numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune import training

from oprd_tune.modeling.safe_reading import load_state, load_tensors
from oprd_tune.ranks import Ranks
from oprd_tune.run.export import quiet
from oprd_tune.teacher.self_teaching import MovingAverage
from oprd_tune.training.schedules import restore_schedule

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # what a checkpoint holds of a model


def load_checkpoint(
    checkpoint: Path,
    model: nn.Module,
    optimizer: Optimizer,
    parts: Mapping[str, Any],
    *,
    average: MovingAverage | None = None,
    seed: int,
    ranks: Ranks | None = None,
) -> int:
    """Load a checkpoint; returns the number of finished optimizer steps. Call it when everything is set up.

    Args:
        checkpoint: a folder that `RunFolder.save` wrote, on any number of ranks.
        model: the student, wrapped as it trains.
        optimizer: the optimizer of the student's trainable parameters.
        parts: the same objects as those that were saved.
        average: the student's, which becomes the teacher's weights again.
        seed: seeds the random numbers if the number of ranks has changed, since no saved state fits then. Shuffling and
            sampling do not depend on that state: they follow from the run's seed and the step.
    """
    ranks = ranks or Ranks()
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    saved: dict[str, Any] = {"model": weights, "optimizer": moments}
    if average is not None:
        saved["average"] = average.tensors  # they are read into their places
    with quiet():
        load_tensors(saved, checkpoint, no_dist=ranks.world_size == 1)
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=TRAINED
    )
    if average is not None:
        average.hand_over()
    state = load_state(checkpoint)
    for name, part in parts.items():
        if isinstance(part, LRScheduler):
            restore_schedule(part, state["parts"][name])
        elif part is not None:
            part.load_state_dict(state["parts"][name])
    if len(state["rng"]) == ranks.world_size:
        _restore_rng(state["rng"][ranks.rank])
    else:
        training.set_seed(seed)
    print(f"Resuming after step {state['step']}, from {checkpoint}")
    return state["step"]


def _restore_rng(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def rng_state() -> dict[str, Any]:
    """The state of every random number generator of this process."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
