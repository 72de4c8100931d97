"""The `rms` scales of a hidden-state loss, fixed from the first step's targets with one extra teacher pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from oprd_tune.losses.hidden_mse import HiddenStateLoss
from oprd_tune.ranks import Ranks
from oprd_tune.selection import Selection
from oprd_tune.training.teachers import Teachers
from oprd_tune.types import Rollout


def calibrate(
    loss: HiddenStateLoss | None,
    teachers: Teachers,
    micro_batches: Sequence[Rollout],
    select: Callable[[Rollout], Selection],
    ranks: Ranks,
) -> None:
    """Give a loss the teachers' mean square at each layer, over all ranks. Nothing happens if the loss needs none.

    Args:
        loss: the run's hidden-state loss; None if the run has none.
        micro_batches: this rank's microbatches of the first step.
        select: selects a microbatch's states, as in training.
    """
    if loss is None or not loss.needs_calibration:
        return
    totals: dict[int, float] = {}
    count = 0
    for micro in micro_batches:
        selection = select(micro)
        count += len(selection)
        states = teachers.of(micro).targets(micro, selection.teacher_index_T).states
        for layer, state_TC in states.items():
            totals[layer] = totals.get(layer, 0.0) + state_TC.float().square().mean(-1).sum().item()
    *sums, everywhere = ranks.total([*totals.values(), count])
    loss.calibrate(dict(zip(totals, sums, strict=True)), int(everywhere))
