"""A teacher whose hidden states the losses compare with the student's: frozen, or the student itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from oprd_tune.modeling.output import evaluating
from oprd_tune.modeling.row_attention import takes_rows
from oprd_tune.modeling.taps import collect_states, cut_after
from oprd_tune.packing import Packed
from oprd_tune.protocols import Projections
from oprd_tune.types import LayerPair, TeacherTargets


class TappedTeacher:
    """Computes the states of chosen layers of any decoder, without gradient and without dropout.

    Of a student that is its own teacher, these are the states of its present weights. It need not stay in memory twice.

    Args:
        model: a loaded decoder, which is left as it is.
        pairs: the layers of a hidden-state loss; empty without one.
        bridge: projects states as soon as they are computed, so that no whole ones are kept; None keeps whole states.
    """

    def __init__(
        self, model: TransformerDecoder, pairs: Sequence[LayerPair], *, bridge: Projections | None = None
    ) -> None:
        self._model, self._pairs, self._depth, self._bridge = model, list(pairs), len(model.layers), bridge

    def targets(
        self,
        tokens_BS: Tensor,
        index_T: Tensor,
        final_index_T: Tensor | None = None,
        *,
        packed: Packed | None = None,
    ) -> TeacherTargets:
        """What the losses compare the student with, from one forward pass. `protocols.Teacher` describes the arguments.

        The tensors are [T, C] in the teacher's dtype, or [T, R] through a bridge.

        Args:
            packed: how to read the rows without their padding, if the model can.
        """
        packed = packed if takes_rows(self._model) else None
        at_T = index_T if packed is None else packed.at(index_T)
        wanted = [(pair.teacher, at_T, self._projection(pair)) for pair in self._pairs]
        if final_index_T is index_T:
            wanted.append((self._depth, at_T, None))
        elif final_index_T is not None:
            wanted.append((self._depth, final_index_T if packed is None else packed.at(final_index_T), None))
        with evaluating(self._model), torch.compiler.set_stance("force_eager"):  # a student's are compiled to train
            states = collect_states(self._model, tokens_BS, wanted, packed)
        final_TC = states.pop() if final_index_T is not None else None
        return TeacherTargets({pair.student: state for pair, state in zip(self._pairs, states, strict=True)}, final_TC)

    def _projection(self, pair: LayerPair) -> Callable[[Tensor], Tensor] | None:
        return None if self._bridge is None else partial(self._bridge.teacher, pair.student)


class FrozenTeacher(TappedTeacher):
    """A model of its own, which only teaches. It is frozen and loses all that no loss reads.

    Args:
        model: a loaded decoder. It loses its head and all layers above the highest one that is needed. If a token loss
            needs the head, hold it as an `LMHead` before.
        pairs: the layers of a hidden-state loss; empty without one.
        final: whether the states after the final norm are needed too.
        bridge: as in `TappedTeacher`.
    """

    def __init__(
        self,
        model: TransformerDecoder,
        pairs: Sequence[LayerPair],
        *,
        final: bool = False,
        bridge: Projections | None = None,
    ) -> None:
        super().__init__(model.eval().requires_grad_(False), pairs, bridge=bridge)
        cut_after(model, self._depth if final else max(pair.teacher for pair in pairs))
