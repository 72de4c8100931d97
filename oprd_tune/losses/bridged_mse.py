"""OPRD-Bridge (§3.3 of arXiv 2606.06021): squared distance between projections of unlike models' hidden states.

    L = 1/|layers| · Σ_ℓ 1/N · Σ_t m_t · ‖z_S − sg(z_T)‖²,    z_S = P_S (h − μ_S),  z_T = P_T (g − μ_T)

Both projections are frozen; the gradient reaches the student's states through P_S. See docs/bridge.md.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from oprd_tune.errors import ConfigError
from oprd_tune.losses.hidden_mse import HiddenStateMSE
from oprd_tune.modeling.bridge import Bridge


def summed_error(student_TR: Tensor, teacher_TR: Tensor, scale: Tensor) -> Tensor:
    """Per-token ‖z_S − z_T‖² / scale, shape [T]."""
    return (student_TR - teacher_TR).square().sum(-1) / scale


def unit_summed_error(student_TR: Tensor, teacher_TR: Tensor, scale: Tensor) -> Tensor:
    """Per-token error between unit vectors, 2 − 2 cos, shape [T]. `scale` is not used: it is 1."""
    return summed_error(F.normalize(student_TR, dim=-1), F.normalize(teacher_TR, dim=-1), scale)


BRIDGED_NORMALISATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "l2": unit_summed_error,
    "variance": summed_error,
    "none": summed_error,
}


class BridgedMSE(HiddenStateMSE):
    """The hidden-state loss of OPRD-Bridge. The recipe gives it its bridge before training.

    Args:
        normalisation: `l2`, both projections scaled to unit length, as in the paper; `variance`, each layer's error
            divided by the variance of the teacher's projections, so that a guess of their mean costs 1; `none`.
        coefficient: factor on the whole loss.

    Raises:
        ConfigError: for an unknown normalisation or a negative coefficient.
    """

    bridge: Bridge

    def __init__(self, normalisation: str = "l2", coefficient: float = 1.0) -> None:
        if normalisation not in BRIDGED_NORMALISATIONS:
            allowed = ", ".join(BRIDGED_NORMALISATIONS)
            raise ConfigError(f"loss.normalisation is {normalisation!r}; allowed are {allowed}")
        super().__init__("none", coefficient)
        self.token_errors = BRIDGED_NORMALISATIONS[normalisation]
        self._by_variance = normalisation == "variance"

    def compared(self, layer: int, student_TD: Tensor) -> Tensor:
        """z_S of a student layer's states."""
        return self.bridge.student(layer, student_TD)

    def scale(self, layer: int) -> float | Tensor:
        """See `HiddenStateMSE.scale`."""
        return self.bridge.variance(layer) if self._by_variance else 1.0
