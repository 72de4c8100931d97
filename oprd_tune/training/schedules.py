"""Learning-rate schedules. The first step already learns: its rate is 1/warmup_steps of the full rate, not 0."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from oprd_tune.config.checks import check_share, check_whole


def cosine_with_warmup(
    optimizer: Optimizer, *, num_training_steps: int, warmup_steps: int = 0, final_ratio: float = 0.0
) -> LambdaLR:
    """Linear warm-up over `warmup_steps`, then half a cosine from the full rate down to `final_ratio` of it.

    `num_training_steps` is the length of the run; recipes pass `max_steps`. Raises ConfigError for a warm-up or a ratio
    that cannot be.
    """
    check_whole("lr_scheduler.warmup_steps", warmup_steps, at_least=0)
    check_share("lr_scheduler.final_ratio", final_ratio)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, num_training_steps - warmup_steps))
        return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def restore_schedule(schedule: LRScheduler, state: dict[str, Any]) -> None:
    """Load a schedule's state, and set the rate that the schedule *now* gives its next step.

    If the schedule covers more steps than before, this rate differs from the one that was saved with the optimizer.
    """
    schedule.load_state_dict(state)
    if isinstance(schedule, LambdaLR):
        groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, rate, factor in groups:
            group["lr"] = rate * factor(schedule.last_epoch)


def constant_with_warmup(optimizer: Optimizer, *, num_training_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Linear warm-up, then a constant rate. Every schedule gets `num_training_steps`; this one does not use it.

    Raises ConfigError for a warm-up that cannot be.
    """
    check_whole("lr_scheduler.warmup_steps", warmup_steps, at_least=0)
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))
