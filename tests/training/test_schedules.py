import itertools
import math

import torch
from torch import nn

from oprd_tune.training import constant_with_warmup, cosine_with_warmup
from oprd_tune.training.schedules import restore_schedule


def rates(make_schedule, steps, **kwargs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, num_training_steps=steps, **kwargs)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_schedules_learn_from_the_first_step():
    assert rates(constant_with_warmup, 5, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(constant_with_warmup, 2) == [1.0, 1.0]
    cosine = rates(cosine_with_warmup, 12, warmup_steps=2, final_ratio=0.1)
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert math.isclose(cosine[7], 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert all(a >= b for a, b in itertools.pairwise(cosine[1:]))


def test_a_longer_schedule_applies_from_the_first_resumed_step():
    def schedule(steps):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, cosine_with_warmup(optimizer, num_training_steps=steps)

    optimizer, short = schedule(4)
    for _ in range(4):
        optimizer.step()
        short.step()
    saved = optimizer.state_dict()
    optimizer, longer = schedule(8)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0
    restore_schedule(longer, short.state_dict())
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.5)
