"""OPRD-Bridge (§3.3 of arXiv 2606.06021): squared distance between projected hidden states of two different models.

    L = 1/|layers| · Σ_ℓ 1/N · Σ_t m_t · ‖z_S − sg(z_T)‖²,    z_S = P_S (h − μ_S),  z_T = P_T (g − μ_T)

Both projections are frozen; the gradient reaches the student's states through P_S. See docs/bridge.md.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from oprd_tune.losses.hidden_mse import HiddenStateLoss, named_error
from oprd_tune.losses.state_errors import StateError, summed_error, unit_summed_error
from oprd_tune.protocols import Projections

BRIDGED_NORMALISATIONS: dict[str, StateError] = {
    "l2": unit_summed_error,
    "variance": summed_error,
    "none": summed_error,
}


class BridgedMSE(HiddenStateLoss):
    """The hidden-state loss of OPRD-Bridge. Raises ConfigError for an unknown normalisation or a negative coefficient.

    Args:
        normalisation: `l2` scales both projections to unit length, as in the paper. `variance` divides each layer's
            error by the variance of the teacher's projections; always predicting their mean then costs 1. `none` does
            neither.
    """

    bridged: ClassVar[bool | None] = True

    def __init__(self, normalisation: str = "l2", coefficient: float = 1.0) -> None:
        super().__init__(named_error(normalisation, BRIDGED_NORMALISATIONS), coefficient)
        self._by_variance = normalisation == "variance"

    def scale(self, layer: int, bridge: Projections | None) -> float | Tensor:
        assert bridge is not None
        return bridge.variance(layer) if self._by_variance else 1.0
