"""Try a config's optimizer and schedule on two small parameters: steps, and a checkpoint written and read.

What fails there would fail in the run too, hours later, and a failure to save would lose what was trained.
"""

from __future__ import annotations

import io
import math
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from oprd_tune.config import construct
from oprd_tune.config.components import Component, in_one_line
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.safe_reading import load_tensors

_STEPS = 3
_GRADIENT, _LARGEST = 0.01, 10_000  # larger weights after so few steps are nonsense, or not finite
_WIDTH = 64  # 8-bit optimizers quantise the state of matrices that are at least that large
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)  # as checkpoints have them
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


def try_optimizer(
    optimizer: Component,
    schedule: Component | None,
    *,
    max_steps: int,
    dtype: torch.dtype,
    device: torch.device,
    vectors: bool = True,
) -> float:
    """Train two small parameters for a few steps, and save and load their state; returns bytes of state for a number.

    Args:
        optimizer: makes the optimizer of a list of parameters.
        schedule: makes the schedule of an optimizer; None keeps the rate constant.
        max_steps: the length of the run, which the schedule gets.
        dtype: the precision in which parameters are trained.
        vectors: whether the student trains vectors too, which some optimizers of matrices refuse.

    Raises:
        ConfigError: if the optimizer or the schedule cannot be made, takes no step, makes numbers that are huge or
            not finite, or has a state that no checkpoint can hold.
    """
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        start = partial(_start, optimizer, dtype, device, vectors)
        trained, made = start()
        planned = construct(schedule, made, num_training_steps=max_steps)
        if schedule is not None and not isinstance(planned, LRScheduler):
            raise ConfigError(
                f"lr_scheduler: {schedule.path} gives a {type(planned).__name__}, which is no LRScheduler"
            )
        for _ in range(min(_STEPS, max_steps)):
            _step(optimizer, trained, made)
            if planned is not None:
                _advance(planned)
        try:
            _save_and_load(trained, made, *start())
        except (Exception, CheckpointException) as error:  # the library's own one does not derive from Exception
            told = shorten(" ".join(str(error).split()), 120, placeholder=" …")
            raise ConfigError(
                f"optimizer: the state of {optimizer.path} cannot be saved in a checkpoint ({type(error).__name__}: "
                f"{told}), so nothing of the run would be kept; give one whose state is plain tensors, such as "
                "torch.optim.AdamW"
            ) from error
    return state_bytes(made, trained["matrix"])


def state_bytes(optimizer: Optimizer, parameter: nn.Parameter) -> float:
    """Bytes of state that an optimizer keeps for each number of a parameter that it has trained."""
    states = (value for value in optimizer.state[parameter].values() if isinstance(value, Tensor))
    return sum(value.nbytes for value in states if value.ndim) / parameter.numel()


def _start(
    make: Component, dtype: torch.dtype, device: torch.device, vectors: bool
) -> tuple[nn.ParameterDict, Optimizer]:
    sizes = {"matrix": (_WIDTH, _WIDTH)} | ({"vector": (_WIDTH,)} if vectors else {})
    trained = nn.ParameterDict({name: torch.ones(size, dtype=dtype, device=device) for name, size in sizes.items()})
    made = make(list(trained.values()))
    if not isinstance(made, Optimizer):
        raise ConfigError(f"optimizer: {make.path} gives a {type(made).__name__}, which is no torch.optim.Optimizer")
    return trained, made


def _step(make: Component, trained: nn.ParameterDict, optimizer: Optimizer) -> None:
    for parameter in trained.values():
        parameter.grad = torch.full_like(parameter, _GRADIENT)
    try:
        optimizer.step()
    except Exception as error:
        raise ConfigError(
            f"optimizer: {make.path} takes no step as runs do it, without a closure: {in_one_line(error)}"
        ) from error
    optimizer.zero_grad(set_to_none=True)
    largest = max(parameter.abs().max().item() for parameter in trained.values())
    if not largest < _LARGEST:
        raise ConfigError(
            f"optimizer: steps of {make.path} with these arguments turn a weight of 1, with a gradient of {_GRADIENT}, "
            f"into {largest:.3g}; lower lr or weight_decay"
        )


def _advance(schedule: LRScheduler) -> None:
    kind = type(schedule).__name__
    try:
        schedule.step()
        buffer = io.BytesIO()
        torch.save(schedule.state_dict(), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"lr_scheduler: this {kind} cannot advance without arguments, or be saved: {in_one_line(error)}"
        ) from error
    rates = [float(group["lr"]) for group in schedule.optimizer.param_groups]
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ConfigError(
            f"lr_scheduler: this {kind} gives the learning rate {rates[0]}; it must be finite, 0 or above"
        )


def _save_and_load(
    trained: nn.ParameterDict, optimizer: Optimizer, other: nn.ParameterDict, another: Optimizer
) -> None:
    """Save the state as checkpoints do, and load it into another optimizer as a run that resumes does."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        weights, moments = get_state_dict(trained, optimizer, options=_OPTIONS)
        content: dict[str, Any] = {"model": weights, "optimizer": moments}
        # As in `RunFolder.save`: a default group for GPUs only is refused.
        group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        saved = async_save(content, checkpoint_id=folder, no_dist=True, process_group=group)
        saved.result()  # type: ignore[union-attr]
        if group is not None:
            dist.destroy_process_group(group)
        weights, moments = get_state_dict(other, another, options=_OPTIONS)
        found: dict[str, Any] = {"model": weights, "optimizer": moments}
        load_tensors(found, Path(folder), no_dist=True)
    set_state_dict(
        other, another, model_state_dict=found["model"], optim_state_dict=found["optimizer"], options=_OPTIONS
    )
