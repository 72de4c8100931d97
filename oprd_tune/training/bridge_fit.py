"""A run's bridge, the same on all ranks: loaded, or fitted on rollouts of the student before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from oprd_tune.config import ONLY_TEACHER, OPRDSettings
from oprd_tune.errors import ConfigError, NothingLeftToDo, RolloutError
from oprd_tune.losses.hidden_mse import HiddenStateLoss
from oprd_tune.losses.masking import StateSelector
from oprd_tune.modeling.bridge import Belonging, Bridge, BridgePlan
from oprd_tune.modeling.moments import PairMoments
from oprd_tune.modeling.output import evaluating
from oprd_tune.modeling.projectors import HeldOut, Projectors, fit_projectors, share_projectors
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.preflight.pair import ModelPair, ModelPairs, of_teacher
from oprd_tune.preflight.teacher_data import TeacherData
from oprd_tune.protocols import RolloutEngine, Teacher
from oprd_tune.ranks import Ranks
from oprd_tune.teacher.frozen import FrozenTeacher
from oprd_tune.torchtune_compat import folder_of, weight_files_of
from oprd_tune.training.bridge_report import as_table, bridge_figure
from oprd_tune.training.gradients import split_alike
from oprd_tune.types import Rollout

FILE, FIGURE = "bridge.safetensors", "bridge.png"
# Called with a student layer, its states [T, D], the paired teacher states [T, C] and the teacher's final states.
OnPair = Callable[[int, Tensor, Tensor, Tensor | None], None]
_BLOCKS, _BLOCK_BYTES = 64, 4096  # a fingerprint reads that many blocks of a weight file


def check_bridges(loss: HiddenStateLoss | None, pairs: ModelPairs) -> None:
    """Raise ConfigError, before weights are read, if a loss lacks a bridge or if a bridge does not fit the run."""
    for pair in pairs:
        with of_teacher(pair.name):
            _check_bridge(loss, pair)


def _check_bridge(loss: HiddenStateLoss | None, pair: ModelPair) -> None:
    plan = pair.bridge
    if plan is None:
        if loss is not None and loss.bridged:
            name = type(loss).__name__
            raise ConfigError(f"{name} needs a bridge; give the section `bridge`, see docs/bridge.md")
        return
    if not isinstance(plan, BridgePlan):
        raise ConfigError(f"bridge gives a {type(plan).__name__}; it must give an oprd_tune.modeling.BridgePlan")
    if loss is None or loss.bridged is False:
        raise ConfigError("there is a section `bridge`, but no loss that uses it: give oprd_tune.losses.BridgedMSE")
    if plan.rank > pair.teacher_width:
        raise ConfigError(f"bridge.rank is {plan.rank}, but the teacher is {pair.teacher_width} wide: at most that")
    if plan.file is not None:
        bridge = Bridge.load(Path(plan.file).expanduser(), device=torch.device("cpu"))
        bridge.check(pair.layers, Belonging(**_models(pair), conventions={}), plan)


def fit_or_load(
    pair: ModelPair,
    data: TeacherData,
    engine: RolloutEngine,
    student: TransformerDecoder,
    teacher: TransformerDecoder,
    select: StateSelector,
) -> Bridge | None:
    """The bridge of a teacher. Every rank calls.

    A run that resumes takes the bridge in its folder. Otherwise `plan.file` names a bridge, or a new one is fitted on
    responses that the student samples before training. The first rank prints it and saves it in the run's folder.

    Args:
        pair: says which bridge; None for no bridge.
        data: what the teacher reads.
        engine: samples the responses.
        student: the student as it trains.
        teacher: the loaded teacher. It must be whole if the plan needs its final state.
        select: selects a microbatch's states, as in training.

    Raises:
        ConfigError: if an existing bridge does not belong to this run.
    """
    plan, settings = pair.bridge, pair.settings
    if plan is None:
        return None
    fit = _Fit(settings, pair, data, engine, student, teacher, select, data.ranks)
    ranks, belongs, folder = data.ranks, fit.belonging(), Path(settings.output_dir)
    own = folder / file_of(pair, FILE)
    if resumed := settings.resume and own.is_file():
        bridge = Bridge.load(own, device=ranks.device)
        bridge.check(pair.layers, belongs, plan)
        if plan.file is None and bridge.plan != plan.fitting:
            raise ConfigError(f"{own} was fitted as {bridge.plan}, not as {plan.fitting}; give another output_dir")
    elif plan.file is not None:
        bridge = Bridge.load(Path(plan.file).expanduser(), device=ranks.device)
        bridge.check(pair.layers, belongs, plan)
    else:
        bridge = fit.fit(plan, belongs)
    if ranks.first:
        print(as_table(bridge))
    if ranks.first and not resumed:
        folder.mkdir(parents=True, exist_ok=True)
        bridge_figure(bridge).savefig(folder / file_of(pair, FIGURE), dpi=150)
        bridge.save(own)
    ranks.wait()
    return bridge


def end_if_only_fitted(pairs: ModelPairs, engine: RolloutEngine) -> None:
    """Raise NothingLeftToDo, with the engine closed, if the user asked for the bridges only."""
    fitted = [pair for pair in pairs if pair.bridge is not None and pair.bridge.fit_only]
    if fitted:
        engine.close()
        files = [str(Path(pair.settings.output_dir) / file_of(pair, FILE)) for pair in fitted]
        lie = f"it lies in {files[0]}" if len(files) == 1 else f"they lie in {', '.join(files)}"
        raise NothingLeftToDo(f"bridge.fit_only: {lie}; bridge.file takes it")


def file_of(pair: ModelPair, file: str) -> str:
    """The name of a bridge's file, with its teacher's name among several."""
    suffix = "" if pair.name == ONLY_TEACHER else f"_{pair.name}"
    return Path(file).stem + suffix + Path(file).suffix


@dataclass(frozen=True)
class _Fit:
    """Fits a bridge. `fit_or_load` explains the fields."""

    settings: OPRDSettings
    pair: ModelPair
    data: TeacherData
    engine: RolloutEngine
    student: TransformerDecoder
    teacher: TransformerDecoder
    select: StateSelector
    ranks: Ranks

    def belonging(self) -> Belonging:
        """The models and states that a bridge of this run belongs to."""
        s = self.settings
        conventions = {"positions": s.positions, "positions_k": s.positions_k, "anchor": s.anchor}
        return Belonging(**_models(self.pair), conventions=conventions | {"own_tokens": self.data.reader is not None})

    def fit(self, plan: BridgePlan, belongs: Belonging) -> Bridge:
        """Sample rollouts, accumulate moments, solve, and measure the result on further rollouts."""
        device = torch.device(plan.moments_device) if plan.moments_device else self.ranks.device
        pairs, per_step = self.pair.layers, self.settings.prompts_per_step
        steps, held_out = ceil(plan.prompts / per_step), ceil(plan.held_out_prompts / per_step)
        final = plan.needs_final_state
        teacher = FrozenTeacher(self.teacher, pairs, final=True)  # keeps every layer: training may read more of them
        sizes = self.pair.width, self.pair.teacher_width
        outcome = self.pair.teacher_width if final else None
        moments = {
            pair.student: PairMoments(*sizes, outcome_width=outcome, dtype=plan.dtype, device=device) for pair in pairs
        }
        self.engine.sync_weights(0)
        with tqdm(desc="Bridge", unit="prompt", total=steps * per_step, disable=not self.ranks.first) as bar:
            for micro in self._rollouts(range(steps), bar):
                self._observe(teacher, micro, lambda layer, *states: moments[layer].add(*states), final=final)
        fits = self._solve(plan, moments)
        check = HeldOut(fits, plan.rank)
        with tqdm(desc="Held out", unit="prompt", total=held_out * per_step, disable=not self.ranks.first) as bar:
            for micro in self._rollouts(range(steps, steps + held_out), bar):
                self._observe(teacher, micro, lambda layer, h_TD, g_TC, _: check.add(layer, h_TD, g_TC), final=False)
        bridge = Bridge(pairs, plan.rank, plan.fitting, belongs, check.report(self.ranks))
        for layer, fit in fits.items():
            bridge.set(layer, fit, device=self.ranks.device)
        return bridge

    def _solve(self, plan: BridgePlan, moments: dict[int, PairMoments]) -> dict[int, Projectors]:
        """Each rank solves some of the layer pairs on its device and shares the results with the other ranks."""
        fits = {}
        for place, layer in enumerate(tqdm(list(moments), desc="Solving", unit="layer", disable=not self.ranks.first)):
            own = moments.pop(layer)
            own.merge(self.ranks)
            if not own.hh.count:
                raise RolloutError("no state was selected on the bridge's prompts, so there is nothing to fit it on")
            owner = place % self.ranks.world_size
            fit = None
            if owner == self.ranks.rank:
                fit = fit_projectors(
                    own,
                    basis=plan.basis,
                    intercept=plan.intercept,
                    ridge=plan.ridge,
                    ridge_scale=plan.ridge_scale,
                    device=self.ranks.device,
                )
            fits[layer] = share_projectors(fit, own, owner, self.ranks)
        if self.ranks.first and own.hh.count < 2 * self.pair.width:
            print(
                f"Bridge: {own.hh.count:,} states are few for a regression on {self.pair.width:,} coordinates, so it "
                "will not hold for others; raise bridge.prompts."
            )
        return fits

    def _rollouts(self, steps: Iterable[int], bar: Any) -> Iterable[Rollout]:
        """The microbatches of those steps' prompts, equally many on every rank."""
        s = self.settings
        for step in steps:
            prompts = self.data.prompts.at_step(step)
            rollout = self.engine.generate(prompts, stream=step)
            rollout = self.data.read(rollout, prompts).without_truncated(s.truncated_responses)
            yield from split_alike(rollout, s.tokens_per_micro_batch, self.ranks)
            bar.update(s.prompts_per_step)

    @torch.no_grad()
    def _observe(self, teacher: Teacher, micro: Rollout, on_pair: OnPair, *, final: bool) -> None:
        """Run both models over a microbatch, and pass the states of each layer pair to `on_pair` as they appear."""
        selection = self.select(micro)
        where_T = selection.teacher_index_T
        targets = teacher.targets(micro.teacher_tokens, where_T, where_T if final else None)

        def tap(layer: int, state_BSD: Tensor) -> Tensor:
            on_pair(layer, state_BSD.flatten(0, 1)[selection.index_T], targets.states.pop(layer), targets.final_TC)
            return state_BSD.new_zeros(())

        with evaluating(self.student), layer_taps(self.student, [pair.student for pair in self.pair.layers], tap):
            micro.read_by(self.student)


def _models(pair: ModelPair) -> dict[str, dict[str, Any]]:
    return {
        "student": _facts(pair.student_files, pair.depth, pair.width),
        "teacher": _facts(pair.teacher_files, pair.teacher_depth, pair.teacher_width),
    }


def _facts(files: Any, depth: int, width: int) -> dict[str, Any]:
    """The facts that identify a model. The fingerprint reads blocks evenly spaced over each weight file."""
    digest = sha256()
    for path in sorted(weight_files_of(files)):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for block in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return {"name": folder_of(files).name, "depth": depth, "width": width, "fingerprint": digest.hexdigest()}
