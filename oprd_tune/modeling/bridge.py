"""OPRD-Bridge (§3.3 of arXiv 2606.06021): frozen linear projections that make the states of two models comparable.

At each layer pair, z_S = P_S (h − μ_S) of the student is compared with z_T = P_T (g − μ_T) of the teacher, both of size
R. A `Bridge` is fitted once and never trained. It is saved together with the facts of the models it was fitted for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from oprd_tune.config.checks import check_not_negative, check_whole
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.bridge_file import FORMAT, read_bridge
from oprd_tune.modeling.moments import PairMoments
from oprd_tune.modeling.projectors import BASES, LayerFit, Projectors
from oprd_tune.types import LayerPair


@dataclass(frozen=True)
class BridgePlan:
    """The section `bridge` of a config: how to fit a bridge, or which fitted one to use. Raises ConfigError if invalid.

    Attributes:
        rank: R, the number of the teacher's directions that are compared; at most the teacher's width.
        basis: how directions are chosen: `pca`, `reduced_rank` or `predictive`; see `oprd_tune.modeling.projectors`.
        intercept: centre the student's states as well as the teacher's. False is Eq. 13 itself.
        ridge: regularisation λ of the student's regression, relative to `ridge_scale`.
        ridge_scale: `trace` is the mean variance of a coordinate; `diagonal` is each coordinate's own variance.
        prompts: number of prompts, from the run's first on, whose sampled responses the bridge is fitted on.
        held_out_prompts: number of further prompts on which the fit is measured.
        moments_dtype: dtype in which moments are accumulated, `fp32` or `fp64`.
        moments_device: device of the moments; None is the run's device. `cpu` saves a GPU's memory.
        file: a saved bridge to use instead of fitting one.
        same_weights: refuse a file that was fitted for other weights of these architectures.
        fit_only: end the run once the bridge is fitted.
    """

    free_on_resume: ClassVar[tuple[str, ...]] = ("fit_only", "held_out_prompts", "moments_device")

    rank: int = 8
    basis: str = "pca"
    intercept: bool = True
    ridge: float = 1e-4
    ridge_scale: str = "trace"
    prompts: int = 2000
    held_out_prompts: int = 64
    moments_dtype: str = "fp32"
    moments_device: str | None = None
    file: str | None = None
    same_weights: bool = True
    fit_only: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "prompts", "held_out_prompts"):
            check_whole(f"bridge.{name}", getattr(self, name))
        choices = {"basis": tuple(BASES), "ridge_scale": ("trace", "diagonal"), "moments_dtype": ("fp32", "fp64")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"bridge.{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        for name in ("intercept", "same_weights", "fit_only"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"bridge.{name} is {getattr(self, name)!r}; allowed are true and false")
        check_not_negative("bridge.ridge", self.ridge)
        try:
            torch.empty(0, device=self.moments_device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"bridge.moments_device {self.moments_device!r} cannot be used: {error}") from error
        if self.file is not None and self.fit_only:
            raise ConfigError("bridge.fit_only fits a bridge and bridge.file loads one; give one of them")
        if self.file is not None and not Path(self.file).expanduser().is_file():
            raise ConfigError(f"bridge.file: there is no file {self.file}; leave it out to fit a bridge")

    @property
    def needs_final_state(self) -> bool:
        """Whether the fit needs the teacher's final state, whichever layers are compared."""
        return self.basis == "predictive" and self.file is None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the moments."""
        return torch.float32 if self.moments_dtype == "fp32" else torch.float64

    def projector_bytes(self, pairs: int, width: int, teacher_width: int) -> int:
        """Memory of the bridge itself, in bytes, for `pairs` layer pairs."""
        return pairs * (self.rank + 1) * (width + teacher_width) * 4

    def moment_bytes(self, pairs: int, width: int, teacher_width: int) -> int:
        """Most memory of a fit, in bytes: all moments, or all full-rank projectors and the matrices of one solution."""
        if self.file is not None:
            return 0
        outcome = teacher_width if self.needs_final_state else None
        return pairs * PairMoments.bytes_of(width, teacher_width, outcome, self.dtype.itemsize)

    @property
    def fitting(self) -> dict[str, Any]:
        """The settings that the result of a fit depends on."""
        names = ("rank", "basis", "intercept", "ridge", "ridge_scale", "prompts")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Belonging:
    """The models and states that a bridge was fitted for.

    Attributes:
        student: facts of the student: `name`, `depth`, `width` and `fingerprint` of its weights.
        teacher: the same facts of the teacher.
        conventions: how states are selected: positions, their number, anchor, and whether the tokenizers differ.
    """

    student: Mapping[str, Any]
    teacher: Mapping[str, Any]
    conventions: Mapping[str, Any]

    def differences(self, other: Belonging, *, same_weights: bool) -> list[str]:
        """One line for each fact in which `other`, a file's, differs from this run's. Names are not compared."""
        found = []
        for part in ("student", "teacher", "conventions"):
            mine, theirs = getattr(self, part), getattr(other, part)
            for key in mine:
                if key == "name" or (key == "fingerprint" and not same_weights) or mine[key] == theirs.get(key):
                    continue
                if key == "fingerprint":
                    found.append(f"its {part}, {theirs['name']}, has other weights than {mine['name']}")
                else:
                    found.append(f"{part} {key} {theirs.get(key)!r} in the file, {mine[key]!r} in this run")
        return found


@dataclass(frozen=True)
class _LayerProjection:
    student_RD: Tensor
    student_mean_D: Tensor
    teacher_RC: Tensor
    teacher_mean_C: Tensor
    variance: Tensor


@dataclass
class Bridge:
    """Projections of student and teacher states by student layer.

    Attributes:
        plan: `BridgePlan.fitting` of the fit.
        belongs: the models and states that the bridge was fitted for.
        report: how well it fits, by student layer.
    """

    pairs: Sequence[LayerPair]
    rank: int
    plan: Mapping[str, Any]
    belongs: Belonging
    report: dict[int, LayerFit] = field(default_factory=dict)
    _layers: dict[int, _LayerProjection] = field(default_factory=dict)

    def set(self, layer: int, fit: Projectors, *, device: torch.device) -> None:
        """Use the first R directions of a layer's fit, in fp32."""
        student_RD, teacher_RC = fit.student_RD[: self.rank], fit.teacher_RC[: self.rank]
        variance = fit.variance_R[: self.rank].sum()
        kept = (student_RD, fit.student_mean_D, teacher_RC, fit.teacher_mean_C, variance)
        self._layers[layer] = _LayerProjection(*(t.to(device=device, dtype=torch.float32).contiguous() for t in kept))

    def student(self, layer: int, state_TD: Tensor) -> Tensor:
        """z_S of a student layer's states, [T, R], in at least fp32."""
        own = self._layers[layer]
        return _project(state_TD, own.student_mean_D, own.student_RD)

    def teacher(self, layer: int, state_TC: Tensor) -> Tensor:
        """z_T of states of the teacher layer that is paired with student layer `layer`, [T, R]."""
        own = self._layers[layer]
        return _project(state_TC, own.teacher_mean_C, own.teacher_RC)

    def variance(self, layer: int) -> Tensor:
        """E‖z_T‖² over the rows of the fit, a scalar."""
        return self._layers[layer].variance

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file. Its metadata is JSON and can be read without this package."""
        tensors = {
            f"layers.{layer}.{name}": getattr(own, name).cpu()
            for layer, own in self._layers.items()
            for name in _LayerProjection.__dataclass_fields__
        }
        facts = {
            "pairs": [[pair.student, pair.teacher] for pair in self.pairs],
            "rank": self.rank,
            "plan": dict(self.plan),
            **{part: dict(value) for part, value in vars(self.belongs).items()},
            "report": {layer: vars(fit) for layer, fit in self.report.items()},
        }
        staged = path.with_name(f".{path.name}.staged")
        save_file(tensors, staged, metadata={"format": FORMAT, "bridge": json.dumps(facts)})
        staged.replace(path)

    @classmethod
    def load(cls, path: Path, *, device: torch.device) -> Bridge:
        """Read a saved bridge. Raises ConfigError if the file is damaged or holds anything else than a bridge."""
        facts, tensors = read_bridge(path, device=device)
        layers = {
            pair.student: _LayerProjection(
                **{name: tensors[f"layers.{pair.student}.{name}"] for name in _LayerProjection.__dataclass_fields__}
            )
            for pair in facts["pairs"]
        }
        return cls(
            pairs=facts["pairs"],
            rank=facts["rank"],
            plan=facts["plan"],
            belongs=Belonging(facts["student"], facts["teacher"], facts["conventions"]),
            report=facts["report"],
            _layers=layers,
        )

    def check(self, pairs: Sequence[LayerPair], belongs: Belonging, plan: BridgePlan) -> None:
        """Raise ConfigError if this bridge was fitted for other layers, models or states, or has another rank."""
        problems = belongs.differences(self.belongs, same_weights=plan.same_weights)
        if unknown := [pair for pair in pairs if pair not in self.pairs]:
            shown = [[pair.student, pair.teacher] for pair in unknown]
            problems.append(f"it lacks the layer pairs {shown}; it has {[[p.student, p.teacher] for p in self.pairs]}")
        if self.rank != plan.rank:
            problems.append(f"its rank is {self.rank}, bridge.rank is {plan.rank}")
        if problems:
            raise ConfigError(
                f"this bridge does not belong to this run: {'; '.join(problems)}. Leave bridge.file out to fit one"
                + ("; bridge.same_weights=false accepts other weights" if plan.same_weights else "")
            )


def _project(state_TA: Tensor, mean_A: Tensor, projector_RA: Tensor) -> Tensor:
    wide_TA = state_TA if state_TA.dtype == torch.float64 else state_TA.float()
    return (wide_TA - mean_A) @ projector_RA.to(wide_TA.dtype).T
