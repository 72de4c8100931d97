"""The teachers of a run, each with what belongs to it, and which of them reads a microbatch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torchtune.modules import TransformerDecoder

from oprd_tune.config import ONLY_TEACHER
from oprd_tune.losses.masking import StateSelector
from oprd_tune.metrics.step import Metrics
from oprd_tune.modeling.bridge import Bridge
from oprd_tune.modeling.heads import Heads, LMHead, why_no_matrix
from oprd_tune.preflight.data import RunData
from oprd_tune.preflight.pair import ModelPair, ModelPairs, whose
from oprd_tune.protocols import RolloutEngine, Teacher
from oprd_tune.teacher.frozen import TappedTeacher
from oprd_tune.training.bridge_fit import end_if_only_fitted, fit_or_load
from oprd_tune.training.student import Student
from oprd_tune.types import LayerPair, Rollout, TeacherTargets


@dataclass
class TeacherSide:
    """The teacher's side of a comparison with the student.

    Attributes:
        teacher: gives the targets.
        pairs: the layers of the student and of this teacher that a loss on hidden states compares.
        bridge: maps both models' states, or None.
        heads: the LM heads of the student and of this teacher; None if neither a loss nor a diagnosis reads them. With
            losses that read the student's alone, it stands for both.
        has_head: whether the teacher's next tokens can be compared. False with other tokens than the student's.
        name: the teacher's name among several; None if it is the only one.
    """

    teacher: Teacher
    pairs: list[LayerPair]
    bridge: Bridge | None = None
    heads: Heads | None = None
    has_head: bool = True
    name: str | None = None

    def targets(self, micro: Rollout, index_T: Tensor, final_index_T: Tensor | None = None) -> TeacherTargets:
        """As in `protocols.Teacher`, for a microbatch. Our own teachers read packed rows as such.

        Final states are left out where nothing could be compared with them.
        """
        where = (index_T,) if final_index_T is None or not self.has_head else (index_T, final_index_T)
        if isinstance(self.teacher, TappedTeacher):
            return self.teacher.targets(micro.teacher_tokens, *where, packed=micro.teacher_packed)
        return self.teacher.targets(micro.teacher_tokens, *where)

    def merge(self, metrics: Metrics, own: Metrics) -> None:
        """Add the metrics of a microbatch that this teacher has read; among several also as `teachers/<name>/…`."""
        metrics.merge(own)
        if self.name is not None:
            metrics.merge_means(own, prefix=f"teachers/{self.name}/")


class Teachers(list[TeacherSide]):
    """A run's teachers, in the order of the config."""

    def of(self, micro: Rollout) -> TeacherSide:
        """The teacher that reads a microbatch."""
        return self[micro.teacher]


def load_teachers(
    load: Callable[..., TransformerDecoder],
    pairs: ModelPairs,
    data: RunData,
    student: Student,
    engine: RolloutEngine,
    select: StateSelector,
    *,
    token_loss: bool,
) -> Teachers:
    """Load the teachers one after the other, and fit or load their bridges. Every rank calls.

    Args:
        load: `Run.load_teacher`.
        token_loss: whether a loss reads the student's LM head.

    Raises:
        NothingLeftToDo: if the user asked for the bridges only.
    """
    found = Teachers()
    for pair in pairs:
        own = data.teachers[pair.name]
        model = load(pair, own, student, top=pair.teacher_top)
        heads, final = None, pair.compares_heads or _is_diagnosed(pair, model)
        if final:  # while the teacher has its head
            heads = Heads(LMHead(student.model), LMHead(model, "teacher_model"), pair.vocabulary)
        elif token_loss:
            heads = Heads(LMHead(student.model), LMHead(student.model), pair.vocabulary)
        bridge = fit_or_load(pair, own, engine, student.model, model, select)
        teacher = student.taught_by(model, pair, final=final, bridge=bridge)
        name = None if pair.name == ONLY_TEACHER else pair.name
        found.append(TeacherSide(teacher, pair.layers, bridge, heads, final, name))
    end_if_only_fitted(pairs, engine)
    return found


def _is_diagnosed(pair: ModelPair, teacher: TransformerDecoder) -> bool:
    """Whether a run without a token loss looks at this teacher's distributions. If it cannot, it says why."""
    what = why_no_matrix(teacher) if pair.diagnosed else None
    if what is not None:  # a scaling that only shows in a loaded head
        print(f"No diagnostics of next tokens, since {whose(pair.name)} {what}.")
    return pair.diagnosed and what is None
