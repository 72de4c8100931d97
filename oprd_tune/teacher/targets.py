"""A frozen teacher, and the hidden states that it gives as targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from oprd_tune.modeling.taps import collect_states, cut_after


class FrozenTeacher:
    """Gives the states of chosen layers; consists of what that takes and nothing more.

    Args:
        model: a loaded decoder. It is frozen, and cut after the highest of `layers`; its head goes too.
        layers: the layers to tap, from 1, ascending and unique.
    """

    def __init__(self, model: TransformerDecoder, layers: Sequence[int]) -> None:
        self._model = model.eval().requires_grad_(False)
        self._layers = list(layers)
        cut_after(model, self._layers[-1])

    def targets(self, tokens_BS: Tensor, index_T: Tensor) -> dict[int, Tensor]:
        """States at the selected positions, by teacher layer.

        Args:
            tokens_BS: right-padded token ids.
            index_T: positions in the flattened [B * S] grid.

        Returns:
            Tensors [T, C] in the teacher's dtype.
        """
        return collect_states(self._model, tokens_BS, self._layers, index_T)

    @torch.no_grad()
    def square_sums(self, tokens_BS: Tensor, index_T: Tensor) -> dict[int, float]:
        """Σ_t 1/C · ‖g_t‖² by teacher layer: what the `rms` normalisation is calibrated with."""
        states = self.targets(tokens_BS, index_T)
        return {layer: state_TC.float().square().mean(-1).sum().item() for layer, state_TC in states.items()}
