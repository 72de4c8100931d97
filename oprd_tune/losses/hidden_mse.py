"""OPRD, Eq. 6 of arXiv 2606.06021: mean squared distance between hidden states at chosen layers.

    L = 1/|layers| · Σ_ℓ 1/N · Σ_t m_t · 1/D · ‖h_ℓ,t − sg(g_ℓ,t)‖²

`HiddenStateLoss` takes any error between two states, `HiddenStateMSE` those of the paper. `LayerStream` is one
microbatch, fed layer by layer by the taps. All yield sums: N, the selected tokens of the whole optimizer step, divides
once, in the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from oprd_tune.config.checks import check_not_negative
from oprd_tune.config.components import find_function
from oprd_tune.errors import ConfigError
from oprd_tune.losses.streaming import streamed_sum
from oprd_tune.metrics.step import Metrics
from oprd_tune.protocols import Projections
from oprd_tune.types import LayerPair, Selection

QUARTERS = 4
# Student and teacher states, [T, D] each or [T, R] over a bridge, in fp32, to one error a token, [T].
StateError = Callable[[Tensor, Tensor], Tensor]


def squared_error(student_TD: Tensor, teacher_TD: Tensor) -> Tensor:
    """Per-token ‖h − g‖² / D, shape [T]."""
    return (student_TD - teacher_TD).square().mean(-1)


def unit_squared_error(student_TD: Tensor, teacher_TD: Tensor) -> Tensor:
    """Per-token error between unit vectors, (2 − 2 cos) / D, shape [T]."""
    return squared_error(F.normalize(student_TD, dim=-1), F.normalize(teacher_TD, dim=-1))


class HiddenStateLoss:
    """A loss on hidden states from any error between a student's and a teacher's state.

    It compares states as they are, or their projections where the run has a bridge.

    Args:
        error: a differentiable function of `student_TD` and `teacher_TD` that returns [T], or its dotted path. It runs
            once for each layer and microbatch; its graph is gone before the next layer.
        coefficient: factor on the whole loss.

    Attributes:
        bridged: whether it needs a bridge (True), cannot use one (False), or takes either (None).
        needs_calibration: whether `calibrate` has to come before the first `stream`.

    Raises:
        ConfigError: if there is no such function, or for a negative coefficient.
    """

    bridged: ClassVar[bool | None] = None

    def __init__(self, error: StateError | str, coefficient: float = 1.0) -> None:
        check_not_negative("loss.coefficient", coefficient)
        self.error: StateError = find_function("loss.error", error)
        self.coefficient = coefficient
        self.needs_calibration = False
        self.scales: dict[int, float] = {}

    def calibrate(self, square_sums: Mapping[int, float], count: int) -> None:
        """Freeze what each layer's errors are divided by: the teacher's mean square there.

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

    def scale(self, layer: int, bridge: Projections | None) -> float | Tensor:
        """What a layer's errors are divided by."""
        return self.scales.get(layer, 1.0)

    def stream(
        self,
        pairs: Sequence[LayerPair],
        targets: dict[int, Tensor],
        selection: Selection,
        bridge: Projections | None = None,
        *,
        measured: bool = True,
    ) -> LayerStream:
        """Open one microbatch.

        Args:
            pairs: the paired layers, ascending by student layer.
            targets: by student layer, what it imitates. Emptied as they are used.
            selection: the selected states.
            bridge: projects the student's states; the targets are projections then.
            measured: whether to measure errors and cosines too.
        """
        return LayerStream(self, pairs, targets, selection, bridge, measured=measured)

    def state_dict(self) -> dict[str, object]:
        """The frozen scales; empty unless the loss is calibrated."""
        return {"scales": dict(self.scales)}

    def load_state_dict(self, state: Mapping[str, dict[int, float]]) -> None:
        """Restore frozen scales."""
        if state["scales"]:
            self.scales = dict(state["scales"])
            self.needs_calibration = False


NORMALISATIONS: dict[str, StateError] = {"none": squared_error, "l2": unit_squared_error, "rms": squared_error}


class HiddenStateMSE(HiddenStateLoss):
    """The hidden-state loss of OPRD.

    Args:
        normalisation: `none`, Eq. 6 as written; `l2`, both states scaled to unit length (wants a coefficient of about
            D); `rms`, each layer's error divided by the teacher's mean square there, taken over the first step's
            selected tokens and then frozen.
        coefficient: factor on the whole loss.

    Raises:
        ConfigError: for an unknown normalisation or a negative coefficient.
    """

    bridged: ClassVar[bool | None] = False

    def __init__(self, normalisation: str = "none", coefficient: float = 1.0) -> None:
        super().__init__(named_error(normalisation, NORMALISATIONS), coefficient)
        self.needs_calibration = normalisation == "rms"


def named_error(normalisation: str, known: Mapping[str, StateError]) -> StateError:
    """The error of a normalisation.

    Raises:
        ConfigError: for one that is not known.
    """
    if normalisation not in known:
        raise ConfigError(f"loss.normalisation is {normalisation!r}; allowed are {', '.join(known)}")
    return known[normalisation]


class LayerStream:
    """One microbatch of the loss: call it with each tapped layer in ascending order, then read the results.

    Attributes:
        layers: the student layers that it reads.
        total: Σ_ℓ Σ_t of the token errors, divided by |layers| and times the coefficient; a scalar with a graph.
        metrics: `layers/mse_<layer>`, never normalised, `layers/cosine_<layer>`, and `positions/cosine_quarter_<n>`.
    """

    def __init__(
        self,
        loss: HiddenStateLoss,
        pairs: Sequence[LayerPair],
        targets: dict[int, Tensor],
        selection: Selection,
        bridge: Projections | None,
        *,
        measured: bool,
    ) -> None:
        self._loss, self._targets, self._selection, self._bridge = loss, targets, selection, bridge
        self.layers = [pair.student for pair in pairs]
        self._measured = measured
        self._quarter_cosines = torch.zeros(QUARTERS, device=selection.index_T.device)
        self.total: Tensor | None = None
        self.metrics = Metrics()

    def __call__(self, layer: int, state_BSD: Tensor) -> Tensor:
        """Add one student layer's errors; returns the running total."""
        teacher_TD = self._targets.pop(layer)

        def sum_of_errors(state_TD: Tensor) -> Tensor:
            student_TD = state_TD if self._bridge is None else self._bridge.student(layer, state_TD)
            target_TD = teacher_TD.to(student_TD.dtype)
            if self._measured:
                self._measure(layer, student_TD.detach(), target_TD)
            scale = torch.as_tensor(
                self._loss.scale(layer, self._bridge), dtype=student_TD.dtype, device=student_TD.device
            )
            return (self._loss.error(student_TD, target_TD) / scale).sum()

        layer_sum = streamed_sum(state_BSD, self._selection.index_T, sum_of_errors)
        term = layer_sum * (self._loss.coefficient / len(self.layers))
        self.total = term if self.total is None else self.total + term
        return self.total

    @torch.no_grad()
    def _measure(self, layer: int, student_TD: Tensor, teacher_TD: Tensor) -> None:
        cosine_T = F.cosine_similarity(student_TD, teacher_TD, dim=-1)
        self.metrics.add_each(f"layers/mse_{layer:02d}", squared_error(student_TD, teacher_TD))
        self.metrics.add_each(f"layers/cosine_{layer:02d}", cosine_T)
        self._quarter_cosines.index_add_(0, self._selection.quarter_T, cosine_T.float())
        if layer == self.layers[-1]:
            states_4 = torch.bincount(self._selection.quarter_T, minlength=QUARTERS) * len(self.layers)
            for quarter, (total, states) in enumerate(zip(self._quarter_cosines, states_4, strict=True), start=1):
                self.metrics.add(f"positions/cosine_quarter_{quarter}", total, states)
