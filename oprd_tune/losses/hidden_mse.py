"""OPRD, Eq. 6 of arXiv 2606.06021: mean squared distance between hidden states at chosen layers.

    L = 1/|layers| · Σ_ℓ 1/N · Σ_t m_t · 1/D · ‖h_ℓ,t − sg(g_ℓ,t)‖²

`HiddenStateLoss` takes any error between two states; `HiddenStateMSE` has those of the paper. The taps feed one
microbatch, a `LayerStream`, layer by layer. Losses are sums; the recipe divides once by N, the number of selected
tokens in the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from oprd_tune.config.checks import check_not_negative
from oprd_tune.config.components import find_function
from oprd_tune.errors import ConfigError
from oprd_tune.losses.masking import PARTS
from oprd_tune.losses.state_errors import StateError, compared, has_closed_form, squared_error, unit_squared_error
from oprd_tune.losses.streaming import evaluated_sum, selected_rows, widened
from oprd_tune.metrics.history import COSINE_MAP
from oprd_tune.metrics.step import Metrics
from oprd_tune.protocols import Projections
from oprd_tune.selection import Selection
from oprd_tune.torchtune_compat import compile_backend
from oprd_tune.types import LayerPair


class HiddenStateLoss:
    """A loss on hidden states with any error function; it compares projections of the states if the run has a bridge.

    Args:
        error: a differentiable function of `student_TD` and `teacher_TD` that returns [T], or its dotted path. It runs
            once per layer and microbatch, and its graph is freed before the next layer. The errors of `state_errors`
            are not run: value and gradient are known in closed form.
        coefficient: factor on the whole loss.

    Attributes:
        bridged: True if the loss needs a bridge, False if it cannot use one, None if both work.
        needs_calibration: whether `calibrate` must be called before the first `stream`.

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
        self.compared = compared

    def compile(self) -> None:
        """Fuse the operations of an error that is known in closed form; any other is left as it is."""
        if has_closed_form(self.error):
            self.compared = torch.compile(compared, dynamic=True, backend=compile_backend())

    def calibrate(self, square_sums: Mapping[int, float], count: int) -> None:
        """Fix the divisor of each layer's errors: the mean square of the paired teacher layer.

        Args:
            square_sums: by student layer, Σ_t 1/D · ‖g_t‖² over all selected tokens of the first step on all ranks.
            count: number of those tokens.

        Raises:
            ValueError: if a layer's mean square is zero or NaN.
        """
        scales = {layer: total / count for layer, total in square_sums.items()}
        if dead := [layer for layer, scale in scales.items() if not scale > 0]:
            raise ValueError(
                f"the teacher's states for student layers {dead} are zero or not finite: no scale for `rms`"
            )
        self.scales = scales
        self.needs_calibration = False

    def scale(self, layer: int, bridge: Projections | None) -> float | Tensor:
        """The divisor of a layer's errors."""
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
        """Start one microbatch.

        Args:
            pairs: layer pairs, ascending by student layer.
            targets: by student layer, the teacher's states or, with a bridge, their projections. Each is removed once
                it is used.
            measured: whether to collect metrics as well.
        """
        return LayerStream(self, pairs, targets, selection, bridge, measured=measured)

    def state_dict(self) -> dict[str, object]:
        """The fixed divisors; empty unless the loss is calibrated."""
        return {"scales": dict(self.scales)}

    def load_state_dict(self, state: Mapping[str, dict[int, float]]) -> None:
        if state["scales"]:
            self.scales = dict(state["scales"])
            self.needs_calibration = False


NORMALISATIONS: dict[str, StateError] = {"none": squared_error, "l2": unit_squared_error, "rms": squared_error}


class HiddenStateMSE(HiddenStateLoss):
    """The hidden-state loss of OPRD. Raises ConfigError for an unknown normalisation or a negative coefficient.

    Args:
        normalisation: `none` is Eq. 6 as written. `l2` scales both states to unit length; use a coefficient of about D
            with it. `rms` divides each layer's error by the teacher's mean square at that layer, which is measured on
            the selected tokens of the first step and then fixed.
    """

    bridged: ClassVar[bool | None] = False

    def __init__(self, normalisation: str = "none", coefficient: float = 1.0) -> None:
        super().__init__(named_error(normalisation, NORMALISATIONS), coefficient)
        self.needs_calibration = normalisation == "rms"


def named_error(normalisation: str, known: Mapping[str, StateError]) -> StateError:
    """The error function of a normalisation. Raises ConfigError for an unknown name."""
    if normalisation not in known:
        raise ConfigError(f"loss.normalisation is {normalisation!r}; allowed are {', '.join(known)}")
    return known[normalisation]


class LayerStream:
    """One microbatch of the loss. Call it with each layer of `layers` in ascending order, then read the results.

    Attributes:
        layers: the student layers that it reads.
        total: coefficient / |layers| · Σ_ℓ Σ_t of the token errors; a scalar with a graph.
        metrics: `layers/mse_<layer>` (never normalised), `layers/cosine_<layer>`, `positions/cosine_quarter_<n>`, and
            the map `layers/cosine_by_position`, a row for each layer and a column for each part of a response.
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
        self._squares: list[Tensor] = []  # of each layer, [T]
        self._cosines: list[Tensor] = []
        self.total: Tensor | None = None
        self.metrics = Metrics()

    def __call__(self, layer: int, state_BSD: Tensor) -> Tensor:
        """Add one student layer's errors and return the running total."""
        teacher_TA = self._targets.pop(layer)
        student_TA = selected_rows(state_BSD, self._selection.index_T)
        if self._bridge is not None:
            student_TA = self._bridge.student(layer, widened(student_TA))
        factor = self._loss.coefficient / len(self.layers) / self._loss.scale(layer, self._bridge)

        def evaluate(student_TA: Tensor) -> tuple[Tensor, Tensor]:
            total, gradient_TA, metrics = self._loss.compared(
                self._loss.error, student_TA, teacher_TA, factor, self._measured, self._selection.weight_T
            )
            if metrics is not None:
                self._measure(layer, *metrics, width=student_TA.shape[-1])
            return total, gradient_TA

        term = evaluated_sum(student_TA, evaluate)
        self.total = term if self.total is None else self.total + term
        return self.total

    def _measure(self, layer: int, square_T: Tensor, cosine_T: Tensor, *, width: int) -> None:
        """Keep a layer's metrics of each token; sum those of all layers at the last one."""
        self._squares.append(square_T)
        self._cosines.append(cosine_T)
        if layer < self.layers[-1]:
            return
        part_T, count = self._selection.part_T, len(self._selection)
        error_LT, cosine_LT = torch.stack(self._squares) / width, torch.stack(self._cosines)
        for name, value_LT in (("mse", error_LT), ("cosine", cosine_LT)):
            for number, total in zip(self.layers, value_LT.sum(1, dtype=torch.float64), strict=True):
                self.metrics.add(f"layers/{name}_{number:02d}", total, count)
        zeros_LP = cosine_LT.new_zeros(len(self.layers), PARTS, dtype=torch.float32)
        sum_LP = zeros_LP.index_add(1, part_T, cosine_LT.float())
        count_LP = zeros_LP.index_add(1, part_T, torch.ones_like(cosine_LT, dtype=torch.float32))
        self.metrics.add_map(COSINE_MAP, sum_LP, count_LP)
        quarters = zip(sum_LP.sum(0).view(4, -1).sum(1), count_LP.sum(0).view(4, -1).sum(1), strict=True)
        for quarter, (total, states) in enumerate(quarters, start=1):
            self.metrics.add(f"positions/cosine_quarter_{quarter}", total, states)
