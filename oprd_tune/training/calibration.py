"""The `rms` scales of a hidden-state loss, fixed from the first step's targets with one extra teacher pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from oprd_tune.losses.hidden_mse import HiddenStateMSE
from oprd_tune.ranks import Ranks
from oprd_tune.teacher.targets import FrozenTeacher
from oprd_tune.types import Rollout, Selection


def calibrate(
    loss: HiddenStateMSE,
    teacher: FrozenTeacher,
    micro_batches: Sequence[Rollout],
    select: Callable[[Rollout], Selection],
    ranks: Ranks,
) -> None:
    """Give a loss the teacher's mean square at each layer, over all ranks, if it wants that and has it not yet.

    Args:
        loss: of the run.
        teacher: gives the states.
        micro_batches: of this rank's first step.
        select: a microbatch's selection, as in training.
        ranks: of the run.
    """
    if not loss.needs_calibration:
        return
    totals: dict[int, float] = {}
    count = 0
    for micro in micro_batches:
        selection = select(micro)
        count += len(selection)
        for layer, total in teacher.square_sums(micro.teacher_tokens, selection.teacher_index_T).items():
            totals[layer] = totals.get(layer, 0.0) + total
    *sums, everywhere = ranks.total([*totals.values(), count])
    loss.calibrate(dict(zip(totals, sums, strict=True)), int(everywhere))
