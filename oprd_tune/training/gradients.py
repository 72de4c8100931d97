"""One denominator for the whole step, the gradient norm, and a guard against losses and norms that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from oprd_tune.ranks import Ranks
from oprd_tune.types import Rollout


def backward(loss_sum: Tensor, count: float | Tensor, *, world_size: int = 1) -> None:
    """Backpropagate one microbatch's share of the global mean.

    The loss of an optimizer step is Σ over microbatches and ranks of `loss_sum`, divided once by `count`. FSDP averages
    gradients over ranks, so each share is multiplied by the number of ranks.

    Args:
        loss_sum: the microbatch's loss sum, or one sum for each part of a composite.
        count: N > 0 of the whole step, over all microbatches and ranks; one for each part.
        world_size: the number of data-parallel ranks.
    """
    (loss_sum * (world_size / count)).sum().backward()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
    """Clip gradients to a total norm over all ranks; None clips nothing. Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def split_alike(
    rollout: Rollout,
    tokens_per_micro_batch: int,
    ranks: Ranks,
    *,
    one_if_it_fits: bool = False,
    packed: bool = False,
) -> list[Rollout]:
    """This rank's microbatches, teacher by teacher, padded with idle ones up to the largest number on any rank.

    All ranks must run a sharded model the same number of times, and each of several teachers at the same time. A
    teacher that reads no row on any rank has no microbatch. See `Rollout.split` for the other arguments.
    """
    present = [0] if rollout.teacher_B is None else rollout.teacher_B.unique().tolist()
    own = {
        teacher: rollout.of_teacher(teacher).split(tokens_per_micro_batch, one_if_it_fits=one_if_it_fits, packed=packed)
        for teacher in present
    }
    most: dict[int, int] = {}
    for counts in ranks.collect({teacher: len(found) for teacher, found in own.items()}):
        most |= {teacher: max(count, most.get(teacher, 0)) for teacher, count in counts.items()}
    micro_batches = []
    for teacher in sorted(most):
        found = own.get(teacher, [])
        missing = most[teacher] - len(found)
        micro_batches += found + [replace(rollout.idle(), teacher=teacher) for _ in range(missing)]
    return micro_batches


class FiniteGuard:
    """Refuses steps whose loss or gradient is not finite. `max_in_a_row` refused steps in a row end the run."""

    def __init__(self, max_in_a_row: int) -> None:
        self._max_in_a_row = max_in_a_row
        self._in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """How many steps in a row were refused."""
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue to count from a checkpoint's number."""
        self._in_a_row = state["in_a_row"]

    def allows(self, step: int, *, loss: float, grad_norm: float) -> bool:
        """True if both are finite; raises FloatingPointError at the last of `max_in_a_row` steps that are not."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        if self._in_a_row >= self._max_in_a_row:
            raise FloatingPointError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; the {self._in_a_row}. step in a row that is not "
                "finite"
            )
        return False
