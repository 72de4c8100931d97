"""How far a student's next-token distributions are from its teacher's, in runs whose loss never sees them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from oprd_tune.config import OPRDSettings
from oprd_tune.losses.diagnostics import Probe
from oprd_tune.losses.masking import response_tokens
from oprd_tune.metrics.step import Metrics
from oprd_tune.modeling.heads import Heads
from oprd_tune.modeling.output import evaluating
from oprd_tune.modeling.sharding import gathered
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.ranks import Ranks
from oprd_tune.training.teachers import Teachers, TeacherSide
from oprd_tune.types import Rollout

_FEWEST_ROWS = 4  # tokens of one response alone say little about the others


class Diagnosis:
    """Every so many steps, both whole distributions at a few response tokens: the metrics `diagnostics/…`.

    It takes one more forward pass of both models on a few responses. Runs with a token loss need no such pass.

    Args:
        student: the student's model.
        teachers: those without heads are left out.
    """

    def __init__(self, student: TransformerDecoder, teachers: Teachers, settings: OPRDSettings, ranks: Ranks) -> None:
        self._student, self._teachers, self._settings, self._ranks = student, teachers, settings, ranks
        self._every = settings.diagnostics_every_n_steps if any(teacher.heads for teacher in teachers) else None

    def is_due(self, step: int) -> bool:
        """Whether to look at the rollout of this step. The first is 1."""
        return self._every is not None and step % self._every == 0

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Metrics:
        """Look at evenly spaced tokens of a few responses. Every rank must call, each with its own rollout."""
        metrics = Metrics()
        for number, teacher in enumerate(self._teachers):
            if teacher.heads is not None:
                teacher.merge(metrics, self._look_at(rollout.of_teacher(number), teacher, teacher.heads))
        return metrics

    def _look_at(self, rollout: Rollout, teacher: TeacherSide, heads: Heads) -> Metrics:
        s = self._settings
        looked_at = sum(each.heads is not None for each in self._teachers)
        share = math.ceil(s.diagnostics_tokens / self._ranks.world_size / looked_at)
        micro = _some_rows(rollout, share, s.tokens_per_micro_batch)
        tokens = response_tokens(micro)
        final_TC = teacher.targets(micro, tokens.index_T[:0], tokens.teacher_index_T).final_TC
        if final_TC is None:  # a teacher of the user's that has no distribution
            return Metrics()
        probe = Probe(heads, final_TC, tokens, micro, count=share, k=s.diagnostics_k)

        def look(_: int, state_BSD: Tensor) -> Tensor:
            probe(state_BSD)
            return state_BSD.new_zeros(())

        taps = layer_taps(self._student, [heads.student.layer], look)
        eager = torch.compiler.set_stance("force_eager")  # blocks are compiled for training alone
        with evaluating(self._student), gathered(heads.student.module), taps, eager:
            micro.read_by(self._student)
        return probe.metrics


def _some_rows(rollout: Rollout, tokens: int, tokens_per_micro_batch: int) -> Rollout:
    """Evenly spaced responses that have about so many tokens, as many as fit into a microbatch, but one at least."""
    rows = len(rollout)
    wanted = max(_FEWEST_ROWS, math.ceil(tokens * rows / max(1, rollout.response_tokens)))
    longest = max(int(own.lengths_B.max()) for own in (rollout, rollout.reading) if own is not None)
    fitting = max(1, tokens_per_micro_batch // longest)
    count = min(rows, wanted, fitting)
    return rollout.rows(torch.arange(count, device=rollout.tokens_BS.device) * rows // count)
