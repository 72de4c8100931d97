"""On-policy distillation with token losses on one device: top-k, sampled, full, vOPD, and their sums with OPRD.

The student answers prompts itself. A frozen teacher reads the same tokens, and next-token distributions are compared at
every response token, KL(student ‖ teacher). Both LM heads run on a chunk of tokens at a time, or on a few rows only, at
the end of one student forward and one teacher forward; nothing of size tokens × vocabulary exists.

    tune run opd_topk_single_device --config tiny/opd_topk
    tune cp opd_topk_single_device my_recipe.py; tune cp tiny/opd_topk my.yaml; tune run my_recipe.py --config my.yaml

This file is meant to be copied and edited. `train_step` is the method; everything around it is set-up and bookkeeping.
"""

from __future__ import annotations

import math
import sys
from contextlib import closing
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import config, training
from tqdm import tqdm

from oprd_tune.components import Components
from oprd_tune.errors import ConfigError
from oprd_tune.losses.composite import as_composite
from oprd_tune.losses.diagnostics import Probe
from oprd_tune.losses.masking import check_selection, response_tokens, select_from
from oprd_tune.modeling.lm_head import Heads, LMHead
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.ranks import Ranks
from oprd_tune.settings import OPDSettings, parse_settings
from oprd_tune.teacher import FrozenTeacher, check_teacher, load_teacher
from oprd_tune.training.bridge import BridgeBuilder, check_bridge
from oprd_tune.training.calibration import calibrate
from oprd_tune.training.checkpoint import RunFolder, load_checkpoint
from oprd_tune.training.data import load_data
from oprd_tune.training.device import pick_device
from oprd_tune.training.engine import load_engine, settle_engine
from oprd_tune.training.grads import FiniteGuard, backward, clip_gradients
from oprd_tune.training.journal import Journal
from oprd_tune.training.launch import StopSignals, run_recipe
from oprd_tune.training.pair import ModelPair, load_pair
from oprd_tune.training.preflight import preflight
from oprd_tune.training.student import TiedHeadDrift, load_student
from oprd_tune.types import Prompts, ResponseTokens, Rollout, Selection, TeacherTargets

RECIPE = "opd_topk_single_device"
COMPONENTS = (
    *("model", "checkpointer", "teacher_model", "teacher_checkpointer", "tokenizer", "dataset"),
    *("loss", "optimizer", "rollout", "metric_logger"),
)
OPTIONAL_COMPONENTS = (
    *("lr_scheduler", "eval_dataset", "task_accuracy", "reference_perplexity"),
    *("bridge",),
)
QUANTISATION_PROMPTS = 8


class OPDRecipe:
    """Output-space distillation on one device. Call `setup`, then `train`."""

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg
        self._settings = s = parse_settings(
            cfg, OPDSettings, recipe=RECIPE, components=COMPONENTS, optional_components=OPTIONAL_COMPONENTS
        )
        self._make = Components(cfg)
        self._device, self._dtype = pick_device(s.device, s.dtype)
        self._ranks = Ranks(device=self._device)
        self._folder = RunFolder(s.output_dir, s.keep_checkpoints)
        self._journal = Journal(
            self._folder.path,
            self._ranks,
            log_every_n_steps=s.log_every_n_steps,
            log_samples_every_n_steps=s.log_samples_every_n_steps,
        )
        self._metrics, self._phase = self._journal.metrics, self._journal.phase
        self._guard = FiniteGuard(s.max_nonfinite_steps)
        self._step = 0  # optimizer steps done

    # ---- set-up: everything that can be wrong is found before weights are read ----

    def setup(self) -> bool:
        """Check, load, prepare, and go back to the checkpoint if the run resumes; False if that was all."""
        s, cfg = self._settings, self._cfg
        if s.num_threads is not None:
            torch.set_num_threads(s.num_threads)
        training.set_seed(s.seed)
        check_selection(s.positions, s.positions_k, s.anchor)
        check_teacher(s.teacher_placement, s.teacher_quantization, self._device)
        settle_engine(cfg, self._folder.latest() if s.resume else None, self._device, self._ranks)
        checkpoint = self._folder.check(cfg, resume=s.resume)
        make = self._make
        pair = self._check_models()
        self._data = load_data(make, s, pair, self._ranks)

        preflight(s, make, pair, self._data, self._loss, self._ranks, bridge=self._bridge_plan)
        if s.preflight == "only":
            return False

        logger = make("metric_logger")
        self._load_student(pair)
        self._optimizer = make("optimizer", self._trainable)
        self._lr_scheduler = make("lr_scheduler", self._optimizer, num_training_steps=s.max_steps)
        self._engine = load_engine(
            make, self._model, s, pair, self._data, self._ranks, dtype=self._dtype, top_k_ids=self._loss.sampler_top_k
        )
        self._load_teacher(pair, evaluate=checkpoint is None and s.evaluate_teacher)
        self._folder.open(cfg)
        build = BridgeBuilder(s, pair, self._data, self._engine, self._model, self._teacher, self._select, self._ranks)
        if not build.lead(self._bridge_plan, self._loss.hidden, self._folder.path):
            return False
        if checkpoint is not None:
            self._step = load_checkpoint(checkpoint, self._model, self._optimizer, self._parts, seed=s.seed)
        self._journal.open(logger, self._data.tokenizer, first_step=self._step + (checkpoint is not None))
        logger.log_config(cfg)
        return True

    def _load_student(self, pair: ModelPair) -> None:
        s = self._settings
        self._model = load_student(
            partial(self._make, "model"),
            pair.student_files,
            top=self._top,
            trains_head=True,
            freeze_embedding=s.freeze_embedding,
            activation_checkpointing=s.activation_checkpointing,
            compile=s.compile,
            seed=s.seed,
            dtype=self._dtype,
            device=self._device,
        )
        self._drift = TiedHeadDrift(self._model)
        self._trainable = [p for p in self._model.parameters() if p.requires_grad]

    def _load_teacher(self, pair: ModelPair, *, evaluate: bool) -> None:
        s = self._settings
        measure_accuracy = self._data.teacher_accuracy if evaluate else None
        teacher, errors = load_teacher(
            partial(self._make, "teacher_model"),
            pair.teacher_files,
            dtype=self._dtype,
            device=self._device,
            offloaded=s.teacher_placement == "offloaded",
            quantization=s.teacher_quantization,
            prompts=self._data.prompts.at(range(QUANTISATION_PROMPTS)).as_teacher_reads,
        )
        self._journal.add_teacher_errors(errors)
        if measure_accuracy is not None:
            self._journal.history.teacher_accuracy = measure_accuracy(teacher)
        self._heads = Heads(LMHead(self._model), LMHead(teacher), pair.vocabulary)
        self._teacher = FrozenTeacher(teacher, self._pairs, final=True)

    def _check_models(self) -> ModelPair:
        """Find out whether student, teacher and loss go together."""
        s = self._settings
        self._loss = as_composite(self._make("loss"))
        if not self._loss.token_losses:
            raise ConfigError("loss has no token part; losses on hidden states alone are for oprd_single_device")
        pair = load_pair(self._make, s, hidden_loss=self._loss.hidden is not None, token_loss=True)
        self._bridge_plan = self._make("bridge")
        check_bridge(self._bridge_plan, self._loss.hidden, pair)
        self._pairs, self._top = pair.layers, pair.depth
        self._loss.check(
            vocabulary=pair.vocabulary,
            sampler_temperature=self._make.argument("rollout", "temperature"),
            sampler_is_student=getattr(self._make.type_of("rollout"), "samples_with_student", False),
        )
        return pair

    def _make_checkpointer(self, output_dir: str | None = None) -> Any:
        return config.instantiate(self._cfg.checkpointer, output_dir=output_dir or self._settings.output_dir)

    # ---- the method ----

    def train_step(self, prompts: Prompts) -> float | None:
        """One optimizer step; returns its loss, or None if no update was made."""
        s = self._settings
        with self._phase("sync"):
            self._engine.sync_weights(self._step)
        with self._phase("rollout"):
            rollout = self._engine.generate(prompts, stream=self._step)  # or an error, which leaves the step undone
        self._journal.add_rollout(rollout)
        rollout = rollout.without_truncated(s.truncated_responses)
        # One denominator a part for the whole step, known before the first backward.
        counts = self._loss.counts(rollout, positions=s.positions, positions_k=s.positions_k)
        if not all(counts):
            return None
        counts_P = torch.tensor(counts, device=self._device)
        micro_batches = rollout.split(s.tokens_per_micro_batch)
        if self._loss.hidden is not None:
            calibrate(self._loss.hidden, self._teacher, micro_batches, self._select, self._ranks)

        loss_P = torch.zeros(len(counts), device=self._device)
        for micro in micro_batches:
            tokens, selection = response_tokens(micro), self._select(micro)
            with self._phase("teacher"):
                targets = self._teacher.targets(micro.tokens_BS, selection.index_T, tokens.index_T)
            with self._phase("student"):
                probe = self._probe(targets, tokens, rollout)
                stream = self._loss.stream(
                    targets, tokens, selection, heads=self._heads, pairs=self._pairs, top=self._top, probe=probe
                )
                with layer_taps(self._model, stream.layers, stream):
                    sums_P = self._model(micro.tokens_BS)  # each part's streamed sum, weighted
                backward(sums_P, counts_P)
            loss_P += sums_P.detach() / counts_P
            self._metrics.add_composite(stream, selection)
            if probe is not None:
                self._metrics.add_measures(probe.measures, probe.count)
        loss = loss_P.sum()

        with self._phase("optimizer"):
            grad_norm = clip_gradients(self._trainable, s.clip_grad_norm)
            finite = self._guard.allows(self._step + 1, loss=loss.item(), grad_norm=grad_norm)
            if finite:
                self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self._metrics.set("loss/total", loss.item())
        if len(counts) > 1:
            for name, part in zip(self._loss.parts, loss_P.tolist(), strict=True):
                self._metrics.set(f"loss/{name}", part)
        self._metrics.set("optimizer/grad_norm", grad_norm)
        return loss.item() if finite else None

    def _select(self, rollout: Rollout) -> Selection:
        s = self._settings
        return select_from(rollout, positions=s.positions, k=s.positions_k, anchor=s.anchor)

    def _probe(self, targets: TeacherTargets, tokens: ResponseTokens, rollout: Rollout) -> Probe | None:
        """Every so many steps, a look at both whole distributions at some of the microbatch's tokens."""
        s = self._settings
        if (self._step + 1) % s.diagnostics_every_n_steps:
            return None
        assert targets.final_TC is not None
        share = math.ceil(s.diagnostics_tokens * len(tokens) / rollout.response_tokens)
        return Probe(self._heads, targets.final_TC, tokens, count=share, k=s.diagnostics_k)

    # ---- the loop and its bookkeeping ----

    def train(self) -> int:
        """Run to `max_steps`; returns the exit status."""
        s = self._settings
        if self._step == 0 and not self._journal.history.evaluations:
            self._evaluate()
        with (
            closing(self._engine),
            StopSignals() as stop,
            tqdm(total=s.max_steps, initial=self._step, desc="OPD", unit="step") as bar,
        ):
            while self._step < s.max_steps and not stop.received:
                loss = self.train_step(self._data.prompts.at_step(self._step))
                self._step += 1
                self._finish_step(updated=loss is not None)
                done = self._step == s.max_steps
                if done or self._step % s.evaluate_every_n_steps == 0:
                    self._evaluate()
                if done or self._step % s.checkpoint_every_n_steps == 0:
                    self._save()
                self._journal.show(bar, loss)
        if stop.received:
            self.save()
            print(f"Stopped after step {self._step}; everything is saved. Continue with resume=true.")
            self._journal.close()
            return stop.exit_status
        final = self._folder.export("final", self._model, self._make_checkpointer, dtype=self._dtype)
        self._folder.wait()
        self._journal.finish(final, recipe=RECIPE, steps=self._step, seed=s.seed, dtype=s.dtype)
        return 0

    def _finish_step(self, *, updated: bool) -> None:
        """Advance the schedule and log the step."""
        self._metrics.set("optimizer/lr", self._optimizer.param_groups[0]["lr"])
        if self._lr_scheduler is not None:
            self._lr_scheduler.step()
        if (drift := self._drift.measure(self._model)) is not None:
            self._metrics.set("head/drift", drift)
        self._journal.finish_step(self._step, updated=updated)

    def _evaluate(self) -> None:
        """Measure the student, and export it if it is the best so far."""
        accuracy = self._data.task_accuracy(self._model) if self._data.task_accuracy else None
        perplexity = self._data.reference_perplexity(self._model) if self._data.reference_perplexity else None
        layers = [pair.student for pair in self._pairs]
        if self._journal.add_evaluation(self._step, accuracy, perplexity, layers):
            self._folder.export("best", self._model, self._make_checkpointer, dtype=self._dtype)

    @property
    def _parts(self) -> dict[str, Any]:
        """What has a state, beside the student and its optimizer."""
        return {
            "history": self._journal.history,
            "loss": self._loss,
            "drift": self._drift,
            "guard": self._guard,
            "lr_scheduler": self._lr_scheduler,
        }

    def save(self) -> None:
        """Write a checkpoint of the last finished step."""
        self._save()
        self._folder.wait()

    def _save(self) -> None:
        self._folder.save(self._step, self._model, self._optimizer, self._parts, self._cfg)


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """On-policy distillation with token losses on one device."""
    return run_recipe(OPDRecipe, cfg)


if __name__ == "__main__":
    sys.exit(recipe_main())
