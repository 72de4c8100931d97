"""A reader that meets a teacher's states one token too late: what alignment is worth.

PYTHONPATH=benchmarks tune run oprd_distributed --config tiny/cross_tokenizer reader._component_=misaligned.LateReader
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from oprd_tune.data import Reader
from oprd_tune.types import Reading, Rollout


class LateReader(Reader):
    """Reads as a `Reader`; each state is then paired with the teacher's next one."""

    def read(self, rollout: Rollout, teacher_prompts: Sequence[Sequence[int]]) -> Reading:
        """See `Reader.read`."""
        reading = super().read(rollout, teacher_prompts)
        late_BS = torch.minimum(reading.column_BS + 1, reading.lengths_B[:, None] - 1)
        return replace(reading, column_BS=torch.where(reading.column_BS >= 0, late_BS, -1))
