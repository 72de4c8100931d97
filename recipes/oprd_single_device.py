"""On-policy representation distillation (OPRD, arXiv 2606.06021) on one device.

The student answers prompts itself. A frozen teacher reads the same tokens, and the student's hidden states are pulled
towards the teacher's at chosen layers (Eq. 6). No LM head runs for the loss, on either side.

    tune run oprd_single_device --config tiny/oprd
    tune cp oprd_single_device my_recipe.py; tune cp tiny/oprd my.yaml; tune run my_recipe.py --config my.yaml

This file is meant to be copied and edited. `train_step` is the method; everything around it is set-up and bookkeeping.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import config, training, utils
from tqdm import tqdm

from oprd_tune.data import PromptDataset, PromptStream
from oprd_tune.errors import ConfigError
from oprd_tune.losses.masking import check_selection, count_selected, select_states
from oprd_tune.metrics.buffer import MetricBuffer
from oprd_tune.metrics.history import History
from oprd_tune.metrics.phases import PhaseTimer, peak_memory_bytes
from oprd_tune.modeling.layer_map import check_widths, pair_layers
from oprd_tune.modeling.load import (
    build_on_meta,
    check_context,
    check_weights,
    load_decoder,
    open_checkpointer,
    width_of,
)
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.rollout.engine import RolloutEngine
from oprd_tune.settings import OPRDSettings, parse_settings
from oprd_tune.teacher import FrozenTeacher
from oprd_tune.training.checkpoint import RunFolder, load_checkpoint, restore_rng
from oprd_tune.training.evaluation import samples_as_markdown
from oprd_tune.training.grads import FiniteGuard, backward, clip_gradients
from oprd_tune.training.launch import StopSignals, run_recipe
from oprd_tune.training.student import TiedHeadDrift, prepare_student
from oprd_tune.training.summary import as_table, summarise, write_summary
from oprd_tune.types import Prompts, Rollout, Selection

RECIPE = "oprd_single_device"
COMPONENTS = (
    *("model", "checkpointer", "teacher_model", "teacher_checkpointer", "tokenizer", "dataset"),
    *("loss", "optimizer", "rollout", "metric_logger"),
)
OPTIONAL_COMPONENTS = ("lr_scheduler", "eval_dataset", "task_accuracy", "reference_perplexity")
GIB = 2**30


class OPRDRecipe:
    """OPRD on one device. Call `setup`, then `train`."""

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg
        self._settings = s = parse_settings(
            cfg, OPRDSettings, recipe=RECIPE, components=COMPONENTS, optional_components=OPTIONAL_COMPONENTS
        )
        self._device = utils.get_device(s.device)
        self._dtype = training.get_dtype(s.dtype, device=self._device)
        self._folder = RunFolder(s.output_dir, s.keep_checkpoints)
        self._history = History()
        self._metrics = MetricBuffer()
        self._phase = PhaseTimer(self._device)
        self._guard = FiniteGuard(s.max_nonfinite_steps)
        self._step = 0  # optimizer steps done

    # ---- set-up: everything that can be wrong is found before weights are read ----

    def setup(self) -> None:
        """Check, load, prepare, and go back to the checkpoint if the run resumes."""
        s, cfg = self._settings, self._cfg
        if s.num_threads is not None:
            torch.set_num_threads(s.num_threads)
        training.set_seed(s.seed)
        checkpoint = self._folder.check(cfg, resume=s.resume)
        build, build_teacher = partial(config.instantiate, cfg.model), partial(config.instantiate, cfg.teacher_model)
        student_files, teacher_files = self._check_models(build, build_teacher)
        self._setup_data()
        self._loss = config.instantiate(cfg.loss)
        self._folder.open(cfg)

        teacher = load_decoder(build_teacher, teacher_files, dtype=self._dtype, device=self._device)
        if checkpoint is None and self._task_accuracy is not None:
            self._history.teacher_accuracy = self._task_accuracy(teacher)
        self._teacher = FrozenTeacher(teacher, sorted({pair.teacher for pair in self._pairs}))

        self._model = load_decoder(build, student_files, dtype=self._dtype, device=self._device)
        self._drift = TiedHeadDrift(self._model)
        frozen = prepare_student(
            self._model,
            top=self._pairs[-1].student,
            freeze_embedding=s.freeze_embedding,
            activation_checkpointing=s.activation_checkpointing,
            compile=s.compile,
        )
        if frozen:
            print(frozen)
        self._trainable = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = config.instantiate(cfg.optimizer, self._trainable)
        self._lr_scheduler = (
            config.instantiate(cfg.lr_scheduler, self._optimizer, num_training_steps=s.max_steps)
            if cfg.get("lr_scheduler")
            else None
        )
        self._engine: RolloutEngine = config.instantiate(
            cfg.rollout,
            self._model,
            stop_tokens=self._tokenizer.stop_tokens,
            pad_id=self._tokenizer.pad_id,
            max_new_tokens=s.max_new_tokens,
            samples_per_prompt=s.samples_per_prompt,
            seed=s.seed,
        )
        self._logger = config.instantiate(cfg.metric_logger)
        if checkpoint is not None:
            self._resume(checkpoint)
        self._engine.sync_weights(self._step)
        self._logger.log_config(cfg)

    def _check_models(self, build: Any, build_teacher: Any) -> tuple[Any, Any]:
        """Compare both models' shapes with the settings and with their files; returns the opened checkpointers."""
        s, cfg = self._settings, self._cfg
        check_selection(s.positions, s.positions_k, s.anchor)
        student_files = open_checkpointer("checkpointer", self._make_checkpointer)
        teacher_files = open_checkpointer(
            "teacher_checkpointer", partial(config.instantiate, cfg.teacher_checkpointer, output_dir=s.output_dir)
        )
        student, teacher = build_on_meta(build), build_on_meta(build_teacher)
        check_widths(width_of(student), width_of(teacher))
        self._pairs = pair_layers(
            s.layers, s.layer_pairs, student_depth=len(student.layers), teacher_depth=len(teacher.layers)
        )
        for name, model in (("student", student), ("teacher", teacher)):
            check_context(name, model, max_prompt_tokens=s.max_prompt_tokens, max_new_tokens=s.max_new_tokens)
        check_weights("checkpointer", student_files, student)
        check_weights("teacher_checkpointer", teacher_files, teacher)
        return student_files, teacher_files

    def _make_checkpointer(self, output_dir: str | None = None) -> Any:
        return config.instantiate(self._cfg.checkpointer, output_dir=output_dir or self._settings.output_dir)

    def _setup_data(self) -> None:
        s, cfg = self._settings, self._cfg
        self._tokenizer = config.instantiate(cfg.tokenizer)
        dataset = self._load_dataset(cfg.dataset)
        self._prompts = PromptStream(dataset, prompts_per_step=s.prompts_per_step, seed=s.seed)
        self._task_accuracy = self._reference_perplexity = None
        evaluators = [name for name in ("task_accuracy", "reference_perplexity") if cfg.get(name)]
        if evaluators and not cfg.get("eval_dataset"):
            raise ConfigError(f"{' and '.join(evaluators)} need an eval_dataset, with held-out prompts")
        if evaluators:
            held_out = self._load_dataset(cfg.eval_dataset)
            for name in evaluators:
                setattr(self, f"_{name}", config.instantiate(cfg[name], held_out, self._tokenizer))

    def _load_dataset(self, node: DictConfig) -> PromptDataset:
        dataset = config.instantiate(node, self._tokenizer, max_prompt_tokens=self._settings.max_prompt_tokens)
        if dataset.dropped:
            limit = self._settings.max_prompt_tokens
            print(
                f"{dataset.dropped} of {dataset.dropped + len(dataset)} prompts are longer than {limit} tokens: dropped"
            )
        return dataset

    # ---- the method ----

    def train_step(self, prompts: Prompts) -> float | None:
        """One optimizer step; returns its loss, or None if no update was made."""
        s = self._settings
        with self._phase("rollout"):
            rollout = self._engine.generate(prompts, stream=self._step)
        self._metrics.add_rollout(rollout)
        self._last_rollout = rollout
        self._history.response_tokens += rollout.response_tokens
        # One denominator for the whole step, known before the first backward.
        count = count_selected(rollout.response_mask_BS, positions=s.positions, k=s.positions_k)
        if count == 0:
            return None
        micro_batches = rollout.split(s.tokens_per_micro_batch)
        if self._loss.needs_calibration:
            self._calibrate(micro_batches, count)

        loss = torch.zeros((), device=self._device)
        for micro in micro_batches:
            selection = self._select(micro)
            with self._phase("teacher"):
                targets = self._teacher.targets(micro.tokens_BS, selection.index_T)
            with self._phase("student"):
                stream = self._loss.stream(self._pairs, targets, selection)
                with layer_taps(self._model, [pair.student for pair in self._pairs], stream):
                    loss_sum = self._model(micro.tokens_BS)  # head-less: returns the streamed sum
                backward(loss_sum, count)
            loss += loss_sum.detach() / count
            self._metrics.add_stream(stream, selection)

        with self._phase("optimizer"):
            grad_norm = clip_gradients(self._trainable, s.clip_grad_norm)
            finite = self._guard.allows(self._step + 1, loss=loss.item(), grad_norm=grad_norm)
            if finite:
                self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        with self._phase("sync"):
            self._engine.sync_weights(self._step + 1)
        self._metrics.set("loss/total", loss.item())
        self._metrics.set("optimizer/grad_norm", grad_norm)
        return loss.item() if finite else None

    def _select(self, rollout: Rollout) -> Selection:
        s = self._settings
        return select_states(rollout.response_mask_BS, positions=s.positions, k=s.positions_k, anchor=s.anchor)

    def _calibrate(self, micro_batches: list[Rollout], count: int) -> None:
        """Fix the `rms` scales from the first step's targets, with one extra teacher pass."""
        totals = dict.fromkeys((pair.teacher for pair in self._pairs), 0.0)
        for micro in micro_batches:
            for layer, total in self._teacher.square_sums(micro.tokens_BS, self._select(micro).index_T).items():
                totals[layer] += total
        self._loss.calibrate({pair.student: totals[pair.teacher] for pair in self._pairs}, count)

    # ---- the loop and its bookkeeping ----

    def train(self) -> int:
        """Run to `max_steps`; returns the exit status."""
        s = self._settings
        if self._step == 0 and not self._history.evaluations:
            self._evaluate()
        with StopSignals() as stop, tqdm(total=s.max_steps, initial=self._step, desc="OPRD", unit="step") as bar:
            while self._step < s.max_steps and not stop.received:
                loss = self.train_step(self._prompts.at_step(self._step))
                self._step += 1
                self._history.skipped_steps += loss is None
                self._finish_step()
                done = self._step == s.max_steps
                if done or self._step % s.evaluate_every_n_steps == 0:
                    self._evaluate()
                if done or self._step % s.checkpoint_every_n_steps == 0 or stop.received:
                    self._save()
                self._show(bar, loss)
        if stop.received:
            print(f"Stopped after step {self._step}; everything is saved. Continue with resume=true.")
            self._logger.close()
            return stop.exit_status
        self._finish()
        return 0

    def _finish_step(self) -> None:
        """Advance the schedule and log the step."""
        s, metrics, step = self._settings, self._metrics, self._step
        metrics.set("optimizer/lr", self._optimizer.param_groups[0]["lr"])
        if self._lr_scheduler is not None:
            self._lr_scheduler.step()
        seconds = self._phase.take()
        self._history.loop_seconds += sum(seconds.values())
        metrics.add_times(seconds, self._last_rollout)
        metrics.set("memory/peak", peak_memory_bytes(self._device) / GIB)
        metrics.set("optimizer/skipped_steps", self._history.skipped_steps)
        if (drift := self._drift.measure(self._model)) is not None:
            metrics.set("head/drift", drift)
        self._logged = finished = metrics.finish()
        self._history.add_cosines(step, finished)
        if step % s.log_every_n_steps == 0:
            self._logger.log_dict(finished, step)
        if step % s.log_samples_every_n_steps == 0 and hasattr(self._logger, "log_text"):
            samples = samples_as_markdown(self._last_rollout, self._tokenizer)
            self._logger.log_text("rollout/samples", samples, step)

    def _evaluate(self) -> None:
        """Measure the student, and export it if it is the best so far."""
        history, step = self._history, self._step
        accuracy = self._task_accuracy(self._model) if self._task_accuracy is not None else None
        perplexity = self._reference_perplexity(self._model) if self._reference_perplexity is not None else None
        best = history.best_accuracy
        history.evaluations.append({"step": step, "accuracy": accuracy, "perplexity": perplexity})
        measured = {
            "eval/accuracy": accuracy,
            "eval/perplexity": perplexity,
            "eval/teacher_accuracy": history.teacher_accuracy,
            "eval/gap_closed": history.gap_closed(accuracy),
        }
        self._logger.log_dict({name: value for name, value in measured.items() if value is not None}, step)
        if history.cosines and hasattr(self._logger, "log_figure"):
            figure = history.cosine_figure([pair.student for pair in self._pairs])
            self._logger.log_figure("layers/cosine", figure, step)
        if step and accuracy is not None and best is not None and accuracy > best:
            self._folder.export("best", self._model, self._make_checkpointer)

    def _show(self, bar: Any, loss: float | None) -> None:
        last = self._history.evaluations[-1] if self._history.evaluations else {}
        shown = {"loss": "skipped" if loss is None else f"{loss:.3g}", "tok/s": f"{self._logged['speed/step']:.0f}"}
        shown |= {name: f"{last[name]:.4g}" for name in ("accuracy", "perplexity") if last.get(name) is not None}
        bar.set_postfix(shown, refresh=False)
        bar.update()

    def _save(self) -> None:
        state = {
            "step": self._step,
            "history": self._history.state_dict(),
            "loss": self._loss.state_dict(),
            "drift": self._drift.state_dict(),
            "lr_scheduler": self._lr_scheduler.state_dict() if self._lr_scheduler is not None else None,
        }
        self._folder.save(self._step, self._model, self._optimizer, state, self._cfg)

    def _resume(self, checkpoint: Any) -> None:
        state = load_checkpoint(checkpoint, self._model, self._optimizer)
        self._step = state["step"]
        self._history.load_state_dict(state["history"])
        self._loss.load_state_dict(state["loss"])
        self._drift.load_state_dict(state["drift"])
        if self._lr_scheduler is not None:
            self._lr_scheduler.load_state_dict(state["lr_scheduler"])
        if hasattr(self._logger, "resume_at"):
            self._logger.resume_at(self._step + 1)
        restore_rng(state["rng"])
        print(f"Resuming after step {self._step}, from {checkpoint}")

    def _finish(self) -> None:
        final = self._folder.export("final", self._model, self._make_checkpointer)
        s = self._settings
        summary = summarise(
            self._history,
            recipe=RECIPE,
            steps=self._step,
            peak_memory_bytes=peak_memory_bytes(self._device),
            seed=s.seed,
            device=str(self._device),
            dtype=s.dtype,
        )
        write_summary(self._folder.path, summary, self._history)
        self._logger.close()
        print(f"\n{as_table(summary)}\n\n  student     {final}\n  everything  {self._folder.path}")


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """On-policy representation distillation on one device."""
    return run_recipe(OPRDRecipe, cfg)


if __name__ == "__main__":
    sys.exit(recipe_main())
