"""The processes of a run, and what they exchange outside the models."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from oprd_tune.errors import RolloutError

T = TypeVar("T")
# How long ranks wait for the slowest one: for its rollout, or for the first rank's export. NCCL's default, 10 minutes,
# is too short for these.
PATIENCE = timedelta(hours=2)
_LET_GO_SECONDS = 0.2


@dataclass(frozen=True)
class Ranks:
    """One process among those of a run. A single process needs no process group; its methods do not communicate.

    Attributes:
        rank: the number of this process, from 0.
        world_size: the number of processes; each works on its own part of the data.
        device: the device that this process computes on.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints, logs and writes."""
        return self.rank == 0

    def gather(self, value_N: Tensor) -> Tensor:
        """The values of all ranks, [world_size, N]. It takes one collective."""
        if self.world_size == 1:
            return value_N[None]
        value_N = value_N.to(self.device)
        rows = [torch.empty_like(value_N) for _ in range(self.world_size)]
        dist.all_gather(rows, value_N)
        return torch.stack(rows)

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over ranks, in fp64. All ranks get the same sums."""
        return self.gather(torch.tensor(values, dtype=torch.float64)).sum(0).tolist()

    def sum(self, count: int) -> int:
        """An integer summed over ranks."""
        return int(self.total([count])[0])

    def add_up(self, value: Tensor) -> None:
        """Sum a tensor over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)

    def share(self, value: Tensor, owner: int) -> None:
        """Overwrite a tensor with that of rank `owner`."""
        if self.world_size > 1:
            dist.broadcast(value, owner)

    def largest(self, value: float) -> float:
        """The largest value on any rank."""
        return self.gather(torch.tensor([value], dtype=torch.float64)).max().item()

    def collect(self, value: T) -> list[T]:
        """The objects of all ranks, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        objects: list[T] = [value] * self.world_size
        dist.all_gather_object(objects, value)
        return objects

    def agree(self, action: Callable[[], T], kind: type[Exception] = RolloutError) -> T:
        """Carry out an action on every rank. If it raises an error of this kind on one rank, all ranks raise it."""
        failure: Exception | None = None
        result: list[T] = []
        try:
            result.append(action())
        except kind as error:
            failure = error
        told = self.collect(None if failure is None else str(failure))
        if failures := [found for found in told if found is not None]:
            raise kind(failures[0]) from failure
        return result[0]

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        if self.world_size > 1:
            dist.barrier()


def join_ranks(device: torch.device) -> Ranks:
    """Join the processes that a launcher such as torchrun has started. `device` is this one's own, such as `cuda:3`."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return Ranks(device=device)
        dist.init_process_group(_backend(device), timeout=PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def leave_ranks(*, together: bool) -> None:
    """Make it safe for this process to end. `together` says that all processes leave, none of them after an error.

    A thread of gloo lets go of its last tensors some milliseconds after a collective is done, and needs the interpreter
    for it. If that is gone by then, the thread aborts the process, and a finished run looks like a failed one.
    Destroying the group does not end the thread as long as a device mesh holds the group.
    """
    if dist.is_initialized():
        if together:
            dist.destroy_process_group()
        time.sleep(_LET_GO_SECONDS)


def need_process_group(ranks: Ranks) -> None:
    """Make a process group of one process if there is none. Sharding needs one even then."""
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(_backend(ranks.device), store=store, rank=0, world_size=1)


def _backend(device: torch.device) -> str:
    return "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
