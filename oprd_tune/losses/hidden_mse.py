"""OPRD, Eq. 6 of arXiv 2606.06021: mean squared distance between hidden states at chosen layers.

    L = 1/|layers| · Σ_ℓ 1/N · Σ_t m_t · 1/D · ‖h_ℓ,t − sg(g_ℓ,t)‖²

`HiddenStateMSE` is the loss with its normalisation; `LayerStream` is one microbatch of it, fed layer by layer by the
taps. Both yield sums: N, the selected tokens of the whole optimizer step, divides once, in the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from oprd_tune.errors import ConfigError
from oprd_tune.losses.streaming import streamed_sum
from oprd_tune.types import LayerPair, Selection

QUARTERS = 4


def squared_error(student_TD: Tensor, teacher_TD: Tensor, scale: Tensor) -> Tensor:
    """Per-token ‖h − g‖² / (D · scale), shape [T]."""
    return (student_TD - teacher_TD).square().mean(-1) / scale


def unit_squared_error(student_TD: Tensor, teacher_TD: Tensor, scale: Tensor) -> Tensor:
    """Per-token error between unit vectors, (2 − 2 cos) / D, shape [T]. `scale` is not used: it is 1."""
    return squared_error(F.normalize(student_TD, dim=-1), F.normalize(teacher_TD, dim=-1), scale)


NORMALISATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "none": squared_error,
    "l2": unit_squared_error,
    "rms": squared_error,
}


class HiddenStateMSE:
    """The hidden-state loss of OPRD.

    Args:
        normalisation: `none`, Eq. 6 as written; `l2`, both states scaled to unit length (wants a coefficient of about
            D); `rms`, each layer's error divided by the teacher's mean square there, taken over the first step's
            selected tokens and then frozen.
        coefficient: factor on the whole loss.

    Raises:
        ConfigError: for an unknown normalisation or a negative coefficient.
    """

    def __init__(self, normalisation: str = "none", coefficient: float = 1.0) -> None:
        if normalisation not in NORMALISATIONS:
            raise ConfigError(f"loss.normalisation is {normalisation!r}; allowed are {', '.join(NORMALISATIONS)}")
        if coefficient < 0:
            raise ConfigError(f"loss.coefficient is {coefficient}; it must not be negative")
        self.coefficient = coefficient
        self.token_errors = NORMALISATIONS[normalisation]
        self.needs_calibration = normalisation == "rms"
        self.scales: dict[int, float] = {}

    def calibrate(self, square_sums: Mapping[int, float], count: int) -> None:
        """Freeze the `rms` scales: the teacher's mean square per student layer.

        Args:
            square_sums: Σ_t 1/D · ‖g_t‖² over all selected tokens of the first step, all ranks, by student layer.
            count: how many tokens that were.

        Raises:
            ValueError: if a teacher layer is zero everywhere.
        """
        scales = {layer: total / count for layer, total in square_sums.items()}
        if dead := [layer for layer, scale in scales.items() if not scale > 0]:
            raise ValueError(
                f"the teacher's states for student layers {dead} are zero or not finite: no scale for `rms`"
            )
        self.scales = scales
        self.needs_calibration = False

    def stream(
        self, pairs: Sequence[LayerPair], targets: dict[int, Tensor], selection: Selection, *, metrics: bool = True
    ) -> LayerStream:
        """Open one microbatch. `targets` maps student layers to what they imitate, and is emptied as they are used."""
        return LayerStream(self, pairs, targets, selection, metrics=metrics)

    def compared(self, layer: int, student_TD: Tensor) -> Tensor:
        """What of a student layer's states is compared with its target: all of it."""
        return student_TD

    def scale(self, layer: int) -> float | Tensor:
        """What a layer's squared errors are divided by."""
        return self.scales.get(layer, 1.0)

    def state_dict(self) -> dict[str, object]:
        """The frozen scales; empty unless the normalisation is `rms`."""
        return {"scales": dict(self.scales)}

    def load_state_dict(self, state: Mapping[str, dict[int, float]]) -> None:
        """Restore frozen scales."""
        if state["scales"]:
            self.scales = dict(state["scales"])
            self.needs_calibration = False


class LayerStream:
    """One microbatch of the loss: call it with each tapped layer in ascending order, then read the results.

    Attributes:
        layers: the student layers that it reads.
        total: Σ_ℓ Σ_t of the token errors, divided by |layers| and times the coefficient; a scalar with a graph.
        squared_errors: by student layer, Σ_t 1/D · ‖h − g‖² (detached, never normalised).
        cosines: by student layer, Σ_t cos(h, g) (detached).
        quarter_cosines: Σ_ℓ Σ_t cos(h, g) over the tokens of each response quarter, shape [4].
    """

    def __init__(
        self,
        loss: HiddenStateMSE,
        pairs: Sequence[LayerPair],
        targets: dict[int, Tensor],
        selection: Selection,
        *,
        metrics: bool,
    ) -> None:
        self._loss = loss
        self.layers = frozenset(pair.student for pair in pairs)
        self._targets = targets
        self._selection = selection
        self._metrics = metrics
        self.total: Tensor | None = None
        self.squared_errors: dict[int, Tensor] = {}
        self.cosines: dict[int, Tensor] = {}
        self.quarter_cosines = torch.zeros(QUARTERS, device=selection.index_T.device)

    def __call__(self, layer: int, state_BSD: Tensor) -> Tensor:
        """Add one student layer's errors; returns the running total."""
        teacher_TD = self._targets.pop(layer)

        def sum_of_errors(state_TD: Tensor) -> Tensor:
            student_TD = self._loss.compared(layer, state_TD)
            target_TD = teacher_TD.to(student_TD.dtype)
            if self._metrics:
                self._measure(layer, student_TD.detach(), target_TD)
            scale = torch.as_tensor(self._loss.scale(layer), dtype=student_TD.dtype, device=student_TD.device)
            return self._loss.token_errors(student_TD, target_TD, scale).sum()

        layer_sum = streamed_sum(state_BSD, self._selection.index_T, sum_of_errors)
        term = layer_sum * (self._loss.coefficient / len(self.layers))
        self.total = term if self.total is None else self.total + term
        return self.total

    @torch.no_grad()
    def _measure(self, layer: int, student_TD: Tensor, teacher_TD: Tensor) -> None:
        cosine_T = F.cosine_similarity(student_TD, teacher_TD, dim=-1)
        self.cosines[layer] = cosine_T.sum()
        self.squared_errors[layer] = (student_TD - teacher_TD).square().mean(-1).sum()
        self.quarter_cosines.index_add_(0, self._selection.quarter_T, cosine_T.float())
