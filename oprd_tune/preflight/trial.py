"""Try a config's optimizer and schedule on two small parameters: steps, and a checkpoint written and read.

What fails there would fail in the run too, hours later, and a failure to save would lose what was trained.
"""

from __future__ import annotations

import io
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from oprd_tune.config import construct
from oprd_tune.config.components import Component, in_one_line
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.safe_reading import load_tensors, why
from oprd_tune.modeling.sharding import Sharding
from oprd_tune.ranks import Ranks

_STEPS = 3
_GRADIENT, _LARGEST = 0.01, 10_000  # larger weights after so few steps are nonsense, or not finite
_WIDTH = 64  # on each rank: 8-bit optimizers quantise the state of matrices that are at least that large
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)  # as checkpoints have them


def try_optimizer(
    optimizer: Component,
    schedule: Component | None,
    *,
    max_steps: int,
    dtype: torch.dtype,
    device: torch.device,
    vectors: bool = True,
    sharding: Sharding | None = None,
    folder: Path | None = None,
) -> float:
    """Train two small parameters for a few steps, and save and load their state; returns bytes of state for a number.

    Args:
        optimizer: makes the optimizer of a list of parameters.
        schedule: makes the schedule of an optimizer; None keeps the rate constant.
        max_steps: the length of the run, which the schedule gets.
        dtype: the precision in which parameters are trained.
        vectors: whether the student trains vectors too, which some optimizers of matrices refuse.
        sharding: shards the parameters as the student's will be, and all ranks call; None leaves them whole.
        folder: a folder that all ranks see, if there are several. It is left as it was.

    Raises:
        ConfigError: if the optimizer or the schedule cannot be made, takes no step, makes numbers that are huge or
            not finite, or has a state that no checkpoint can hold.
    """
    ranks = Ranks() if sharding is None else sharding.ranks
    whole = _Trial(optimizer, schedule, max_steps, dtype, device, vectors, ranks)
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        if sharding is None:
            return whole.run()
        try:
            return replace(whole, sharding=sharding, folder=folder).run()
        except ConfigError as error:
            whole.run()  # says so, if more is wrong with it
            raise ConfigError(
                f"optimizer: {optimizer.path} trains whole parameters, but not those that FSDP2 has sharded "
                f"({_reason(error)}); give one that knows DTensors, such as torch.optim.AdamW"
            ) from error


@dataclass(frozen=True)
class _Trial:
    """One trial. `try_optimizer` explains the fields."""

    optimizer: Component
    schedule: Component | None
    max_steps: int
    dtype: torch.dtype
    device: torch.device
    vectors: bool
    ranks: Ranks  # which come to one end, also where each has parameters of its own
    sharding: Sharding | None = None
    folder: Path | None = None

    @property
    def _alone(self) -> bool:
        return self.sharding is None or self.ranks.world_size == 1

    def run(self) -> float:
        """Train, save and load; returns bytes of state for a number."""
        trained, made = self.ranks.agree(self._train, ConfigError)
        self.ranks.agree(lambda: self._save_and_load(trained, made), ConfigError)
        return state_bytes(made, trained.matrix)

    def _train(self) -> tuple[_Parameters, Optimizer]:
        trained, made = self._start()
        planned = construct(self.schedule, made, num_training_steps=self.max_steps)
        if self.schedule is not None and not isinstance(planned, LRScheduler):
            raise ConfigError(
                f"lr_scheduler: {self.schedule.path} gives a {type(planned).__name__}, which is no LRScheduler"
            )
        for _ in range(min(_STEPS, self.max_steps)):
            _step(self.optimizer, trained, made)
            if planned is not None:
                _advance(planned)
        return trained, made

    def _start(self) -> tuple[_Parameters, Optimizer]:
        shares = 1 if self._alone else self.ranks.world_size
        trained = _Parameters(shares * _WIDTH, self.vectors, dtype=self.dtype, device=self.device)
        if self.sharding is not None:
            self.sharding.block(trained)
        made = self.optimizer(list(trained.parameters()))
        if not isinstance(made, Optimizer):
            name = type(made).__name__
            raise ConfigError(f"optimizer: {self.optimizer.path} gives a {name}, which is no torch.optim.Optimizer")
        return trained, made

    def _save_and_load(self, trained: _Parameters, optimizer: Optimizer) -> None:
        """Save the state as checkpoints do, and load it into another optimizer as a run that resumes does."""
        other, another = self._start()
        try:
            with self._scratch() as place:
                _save(trained, optimizer, place, alone=self._alone)
                weights, moments = get_state_dict(other, another, options=_OPTIONS)
                found: dict[str, Any] = {"model": weights, "optimizer": moments}
                load_tensors(found, place, no_dist=self._alone)
            set_state_dict(
                *(other, another),
                model_state_dict=found["model"],
                optim_state_dict=found["optimizer"],
                options=_OPTIONS,
            )
        except (Exception, CheckpointException) as error:  # the library's own one does not derive from Exception
            told = shorten(why(error), 120, placeholder=" …")
            raise ConfigError(
                f"optimizer: the state of {self.optimizer.path} cannot be saved in a checkpoint "
                f"({type(error).__name__}: {told}), so nothing of the run would be kept; give one whose state is "
                "plain tensors, such as torch.optim.AdamW"
            ) from error

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """Within the scope, a folder that all ranks see if they write together."""
        parent = None if self._alone else self.folder
        with tempfile.TemporaryDirectory(dir=parent, prefix=".staged-trial-", ignore_cleanup_errors=True) as own:
            try:
                yield Path(own if self._alone else self.ranks.collect(own)[0])
            finally:
                self.ranks.wait()  # another rank may still read


class _Parameters(nn.Module):
    """What the trial trains: a matrix and a vector."""

    def __init__(self, rows: int, vectors: bool, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(rows, _WIDTH, dtype=dtype, device=device))
        self.vector = nn.Parameter(torch.ones(rows, dtype=dtype, device=device)) if vectors else None


def state_bytes(optimizer: Optimizer, parameter: nn.Parameter) -> float:
    """Bytes of state that an optimizer keeps for each number of a parameter that it has trained."""
    states = (_own(value) for value in optimizer.state[parameter].values() if isinstance(value, Tensor))
    return sum(value.nbytes for value in states if value.ndim) / _own(parameter).numel()


def _own(value: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def _step(make: Component, trained: _Parameters, optimizer: Optimizer) -> None:
    for parameter in trained.parameters():
        parameter.grad = torch.full_like(parameter, _GRADIENT)
    try:
        optimizer.step()
    except Exception as error:
        raise ConfigError(
            f"optimizer: {make.path} takes no step as runs do it, without a closure: {in_one_line(error)}"
        ) from error
    optimizer.zero_grad(set_to_none=True)
    largest = max(_own(parameter).abs().max().item() for parameter in trained.parameters())
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


def _save(trained: _Parameters, optimizer: Optimizer, place: Path, *, alone: bool) -> None:
    weights, moments = get_state_dict(trained, optimizer, options=_OPTIONS)
    content: dict[str, Any] = {"model": weights, "optimizer": moments}
    # As in `RunFolder.save`: a default group for GPUs only is refused, also where each rank saves alone.
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None
    try:
        async_save(content, checkpoint_id=place, no_dist=alone, process_group=group).result()  # type: ignore[union-attr]
    finally:
        if group is not None:
            dist.barrier(group)  # another rank may still be connecting
            dist.destroy_process_group(group)


def _reason(error: BaseException) -> str:
    """What was wrong at first, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {shorten(why(error), 200, placeholder=' …')}"
