"""Which was the first that was not finite: teacher, weights, states, loss or gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtune.modules import TransformerDecoder

from oprd_tune.losses.masking import response_tokens
from oprd_tune.modeling.output import evaluating
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.ranks import Ranks
from oprd_tune.selection import Selection
from oprd_tune.training.teachers import Teachers
from oprd_tune.types import Rollout

_NEITHER = "states of both models are finite, so the loss or its gradient overflows: look at loss, or set dtype=fp32"


@contextmanager
def culprit_named(
    student: TransformerDecoder,
    teachers: Teachers,
    micro_batches: Sequence[Rollout],
    select: Callable[[Rollout], Selection],
    ranks: Ranks,
    *,
    final: bool = False,
) -> Iterator[None]:
    """Within the scope, a FloatingPointError also says where the step's first value that is not finite came from.

    Both models then read the step's microbatches once more. Every rank must enter, and all raise if one does.

    Args:
        final: whether the step compares the teacher's final states, as token losses do.
    """
    try:
        yield
    except FloatingPointError as error:
        found = ranks.collect(_first_in(student, teachers, micro_batches, select, final=final))
        raise FloatingPointError(f"{error}: {next(filter(None, found), _NEITHER)}") from error


@torch.no_grad()
def _first_in(
    student: TransformerDecoder,
    teachers: Teachers,
    micro_batches: Sequence[Rollout],
    select: Callable[[Rollout], Selection],
    *,
    final: bool,
) -> str | None:
    weights = [name for name, weight in student.named_parameters() if not _is_finite(weight)]
    of_teacher: list[tuple[str, int]] = []
    of_student: list[int] = []

    def look(layer: int, state_BSD: Tensor) -> Tensor:
        if not _is_finite(state_BSD):
            of_student.append(layer)
        return state_BSD.new_zeros(())

    for micro in micro_batches:  # all of them on every rank, so that sharded models meet
        selection = select(micro)
        of_final = [response_tokens(micro).teacher_index_T] if final else []
        teacher = teachers.of(micro)
        whose = "the teacher's" if teacher.name is None else f"the teacher {teacher.name}'s"
        targets = teacher.targets(micro, selection.teacher_index_T, *of_final)
        of_teacher += [(whose, layer) for layer in list(targets.states) if not _is_finite(targets.states.pop(layer))]
        if targets.final_TC is not None and not _is_finite(targets.final_TC):
            of_teacher.append((whose, len(student.layers)))
        taps = layer_taps(student, range(1, len(student.layers) + 1), look)
        with evaluating(student), taps, torch.compiler.set_stance("force_eager"):
            micro.read_by(student)
    if weights:  # before the teacher, which may be the student
        return f"the student's weights are not, such as {weights[0]}: an update has overflowed; lower optimizer.lr"
    if of_teacher:
        whose, layer = min(of_teacher, key=lambda found: found[1])
        return (
            f"{whose} states are not, first those for student layer {layer}, although its weights are: "
            "it overflows; set dtype=fp32, or take another teacher"
        )
    if of_student:
        return (
            f"the student's states are not, from block {min(of_student)} on, although its weights are: it overflows; "
            "lower optimizer.lr, or set dtype=fp32"
        )
    return None


def _is_finite(values: Tensor) -> bool:
    own = values.to_local() if isinstance(values, DTensor) else values
    return bool(torch.isfinite(own).all())
