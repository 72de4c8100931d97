"""A frozen teacher, and the hidden states that it gives as targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from oprd_tune.modeling.taps import collect_states, cut_after
from oprd_tune.types import TeacherTargets


class FrozenTeacher:
    """Gives the states of chosen layers; consists of what that takes and nothing more.

    Args:
        model: a loaded decoder. It is frozen, and cut after the highest layer that is needed; its head leaves too (hold
            it as an `LMHead` before, if a token loss needs it).
        layers: the layers of a hidden-state loss, from 1, ascending and unique; empty without one.
        final: whether a token loss needs the states after the final norm.
    """

    def __init__(self, model: TransformerDecoder, layers: Sequence[int], *, final: bool = False) -> None:
        self._model = model.eval().requires_grad_(False)
        self._layers, self._depth = list(layers), len(model.layers)
        cut_after(model, self._depth if final else self._layers[-1])

    def targets(self, tokens_BS: Tensor, index_T: Tensor, final_index_T: Tensor | None = None) -> TeacherTargets:
        """What the losses compare the student with; one forward pass.

        Args:
            tokens_BS: right-padded token ids.
            index_T: positions in the flattened [B * S] grid, for the layers of a hidden-state loss.
            final_index_T: positions of the final states, for a token loss.

        Returns:
            Tensors [T, C] in the teacher's dtype.
        """
        wanted = [(layer, index_T) for layer in self._layers]
        if final_index_T is not None:
            wanted.append((self._depth, final_index_T))
        states = collect_states(self._model, tokens_BS, wanted)
        final_TC = states.pop() if final_index_T is not None else None
        return TeacherTargets(dict(zip(self._layers, states, strict=True)), final_TC)

    @torch.no_grad()
    def square_sums(self, tokens_BS: Tensor, index_T: Tensor) -> dict[int, float]:
        """Σ_t 1/C · ‖g_t‖² by teacher layer: what the `rms` normalisation is calibrated with."""
        states = self.targets(tokens_BS, index_T).states
        return {layer: state_TC.float().square().mean(-1).sum().item() for layer, state_TC in states.items()}
