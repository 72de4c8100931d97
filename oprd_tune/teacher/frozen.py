"""A frozen teacher, and what it gives the student's hidden states to imitate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor
from torchtune.modules import TransformerDecoder

from oprd_tune.modeling.taps import collect_states, cut_after
from oprd_tune.protocols import Projections
from oprd_tune.types import LayerPair, TeacherTargets


class FrozenTeacher:
    """Gives the states of chosen layers; consists of what that takes and nothing more.

    Args:
        model: a loaded decoder. It is frozen, and cut after the highest layer that is needed; its head leaves too (hold
            it as an `LMHead` before, if a token loss needs it).
        pairs: the layers of a hidden-state loss; empty without one.
        final: whether anything needs the states after the final norm.
        bridge: projects states where they are produced, so that no whole one is kept; None keeps them whole.
    """

    def __init__(
        self,
        model: TransformerDecoder,
        pairs: Sequence[LayerPair],
        *,
        final: bool = False,
        bridge: Projections | None = None,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._pairs, self._depth, self._bridge = list(pairs), len(model.layers), bridge
        cut_after(model, self._depth if final else max(pair.teacher for pair in pairs))

    def targets(self, tokens_BS: Tensor, index_T: Tensor, final_index_T: Tensor | None = None) -> TeacherTargets:
        """What the losses compare the student with; one forward pass.

        Args:
            tokens_BS: right-padded token ids, as the teacher reads them.
            index_T: positions in the flattened [B * S] grid, for the layers of a hidden-state loss.
            final_index_T: positions of the final states.

        Returns:
            Tensors [T, C] in the teacher's dtype, or [T, R] through a bridge.
        """
        wanted = [(pair.teacher, index_T, self._projection(pair)) for pair in self._pairs]
        if final_index_T is not None:
            wanted.append((self._depth, final_index_T, None))
        states = collect_states(self._model, tokens_BS, wanted)
        final_TC = states.pop() if final_index_T is not None else None
        return TeacherTargets({pair.student: state for pair, state in zip(self._pairs, states, strict=True)}, final_TC)

    def _projection(self, pair: LayerPair) -> Callable[[Tensor], Tensor] | None:
        return None if self._bridge is None else partial(self._bridge.teacher, pair.student)
