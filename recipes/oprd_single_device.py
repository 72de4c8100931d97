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
from torchtune import config, training
from tqdm import tqdm

from oprd_tune.data import PromptDataset, PromptStream
from oprd_tune.errors import ConfigError
from oprd_tune.losses.composite import Composite
from oprd_tune.losses.masking import check_selection, count_selected, select_states
from oprd_tune.losses.token_loss import TokenLoss
from oprd_tune.modeling.load import load_decoder
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.rollout.engine import RolloutEngine
from oprd_tune.settings import OPRDSettings, instantiate, parse_settings
from oprd_tune.teacher import FrozenTeacher
from oprd_tune.training.checkpoint import RunFolder, load_checkpoint, restore_rng
from oprd_tune.training.device import pick_device
from oprd_tune.training.grads import FiniteGuard, backward, clip_gradients
from oprd_tune.training.journal import Journal
from oprd_tune.training.launch import StopSignals, run_recipe
from oprd_tune.training.optim import restore_schedule
from oprd_tune.training.pair import ModelPair, check_pair
from oprd_tune.training.student import TiedHeadDrift, prepare_student
from oprd_tune.types import Prompts, Rollout, Selection

RECIPE = "oprd_single_device"
COMPONENTS = (
    *("model", "checkpointer", "teacher_model", "teacher_checkpointer", "tokenizer", "dataset"),
    *("loss", "optimizer", "rollout", "metric_logger"),
)
OPTIONAL_COMPONENTS = ("lr_scheduler", "eval_dataset", "task_accuracy", "reference_perplexity")


class OPRDRecipe:
    """OPRD on one device. Call `setup`, then `train`."""

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg
        self._settings = s = parse_settings(
            cfg, OPRDSettings, recipe=RECIPE, components=COMPONENTS, optional_components=OPTIONAL_COMPONENTS
        )
        self._device, self._dtype = pick_device(s.device, s.dtype)
        self._folder = RunFolder(s.output_dir, s.keep_checkpoints)
        self._journal = Journal(
            self._folder.path,
            self._device,
            log_every_n_steps=s.log_every_n_steps,
            log_samples_every_n_steps=s.log_samples_every_n_steps,
        )
        self._metrics, self._phase = self._journal.metrics, self._journal.phase
        self._guard = FiniteGuard(s.max_nonfinite_steps)
        self._step = 0  # optimizer steps done

    # ---- set-up: everything that can be wrong is found before weights are read ----

    def setup(self) -> None:
        """Check, load, prepare, and go back to the checkpoint if the run resumes."""
        s, cfg = self._settings, self._cfg
        if s.num_threads is not None:
            torch.set_num_threads(s.num_threads)
        training.set_seed(s.seed)
        check_selection(s.positions, s.positions_k, s.anchor)
        checkpoint = self._folder.check(cfg, resume=s.resume)
        make = partial(instantiate, cfg)
        build, build_teacher = partial(make, "model"), partial(make, "teacher_model")
        pair = check_pair(
            build,
            build_teacher,
            self._make_checkpointer,
            partial(config.instantiate, cfg.teacher_checkpointer, output_dir=s.output_dir),
            layers=s.layers,
            layer_pairs=s.layer_pairs,
        )
        self._pairs = pair.layers
        self._setup_data(pair)
        self._loss = make("loss")
        if isinstance(self._loss, (TokenLoss, Composite)):
            raise ConfigError(f"{type(self._loss).__name__} compares tokens; that is for opd_topk_single_device")

        self._model = load_decoder(build, pair.student_files, dtype=self._dtype, device=self._device)
        self._drift = TiedHeadDrift(self._model)
        frozen = prepare_student(
            self._model,
            top=self._pairs[-1].student,
            trains_head=False,
            freeze_embedding=s.freeze_embedding,
            activation_checkpointing=s.activation_checkpointing,
            compile=s.compile,
        )
        if frozen:
            print(frozen)
        self._trainable = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = make("optimizer", self._trainable)
        self._lr_scheduler = make("lr_scheduler", self._optimizer, num_training_steps=s.max_steps)
        self._engine: RolloutEngine = make(
            "rollout",
            self._model,
            stop_tokens=self._tokenizer.stop_tokens,
            pad_id=self._tokenizer.pad_id,
            max_new_tokens=s.max_new_tokens,
            samples_per_prompt=s.samples_per_prompt,
            seed=s.seed,
            vocabulary=pair.vocabulary,
        )
        logger = make("metric_logger")
        teacher = load_decoder(build_teacher, pair.teacher_files, dtype=self._dtype, device=self._device)
        if checkpoint is None and self._task_accuracy is not None:
            self._journal.history.teacher_accuracy = self._task_accuracy(teacher)
        self._teacher = FrozenTeacher(teacher, sorted({layers.teacher for layers in self._pairs}))
        self._folder.open(cfg)
        if checkpoint is not None:
            self._resume(checkpoint)
        self._journal.open(logger, self._tokenizer, first_step=self._step + (checkpoint is not None))
        self._engine.sync_weights(self._step)
        logger.log_config(cfg)

    def _make_checkpointer(self, output_dir: str | None = None) -> Any:
        return config.instantiate(self._cfg.checkpointer, output_dir=output_dir or self._settings.output_dir)

    def _setup_data(self, pair: ModelPair) -> None:
        s, cfg = self._settings, self._cfg
        self._tokenizer = instantiate(cfg, "tokenizer")
        datasets = {name: self._load_dataset(name) for name in ("dataset", "eval_dataset") if cfg.get(name)}
        pair.check_tokens(self._tokenizer, list(datasets.values()))
        self._prompts = PromptStream(datasets["dataset"], prompts_per_step=s.prompts_per_step, seed=s.seed)
        held_out = datasets.get("eval_dataset")
        if held_out is None and (cfg.get("task_accuracy") or cfg.get("reference_perplexity")):
            raise ConfigError("task_accuracy and reference_perplexity need an eval_dataset, with held-out prompts")
        evaluate_on = (held_out, self._tokenizer)
        self._task_accuracy = instantiate(cfg, "task_accuracy", *evaluate_on, vocabulary=pair.vocabulary)
        self._reference_perplexity = instantiate(cfg, "reference_perplexity", *evaluate_on, vocabulary=pair.vocabulary)
        lengths = {"max_prompt_tokens + max_new_tokens": s.max_prompt_tokens + s.max_new_tokens}
        if self._task_accuracy:
            longest = s.max_prompt_tokens + self._task_accuracy.max_new_tokens
            lengths["max_prompt_tokens + task_accuracy.max_new_tokens"] = longest
        if self._reference_perplexity:
            lengths["the longest reference answer with its prompt"] = self._reference_perplexity.longest
        pair.check_lengths(lengths)

    def _load_dataset(self, name: str) -> PromptDataset:
        limit = self._settings.max_prompt_tokens
        dataset: PromptDataset = instantiate(self._cfg, name, self._tokenizer, max_prompt_tokens=limit)
        if dataset.dropped:
            total = dataset.dropped + len(dataset)
            print(f"{name}: {dataset.dropped} of {total} prompts are empty or longer than {limit} tokens: dropped")
        return dataset

    # ---- the method ----

    def train_step(self, prompts: Prompts) -> float | None:
        """One optimizer step; returns its loss, or None if no update was made."""
        s = self._settings
        with self._phase("rollout"):
            rollout = self._engine.generate(prompts, stream=self._step)
        self._journal.add_rollout(rollout)
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
                stream = self._loss.stream(self._pairs, targets.states, selection)
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
        if self._step == 0 and not self._journal.history.evaluations:
            self._evaluate()
        with StopSignals() as stop, tqdm(total=s.max_steps, initial=self._step, desc="OPRD", unit="step") as bar:
            while self._step < s.max_steps and not stop.received:
                loss = self.train_step(self._prompts.at_step(self._step))
                self._step += 1
                self._finish_step(updated=loss is not None)
                done = self._step == s.max_steps
                if done or self._step % s.evaluate_every_n_steps == 0:
                    self._evaluate()
                if done or self._step % s.checkpoint_every_n_steps == 0:
                    self._save()
                self._journal.show(bar, loss)
        if stop.received:
            self._save()
            print(f"Stopped after step {self._step}; everything is saved. Continue with resume=true.")
            self._journal.close()
            return stop.exit_status
        final = self._folder.export("final", self._model, self._make_checkpointer)
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
        accuracy = self._task_accuracy(self._model) if self._task_accuracy is not None else None
        perplexity = self._reference_perplexity(self._model) if self._reference_perplexity is not None else None
        layers = [pair.student for pair in self._pairs]
        if self._journal.add_evaluation(self._step, accuracy, perplexity, layers):
            self._folder.export("best", self._model, self._make_checkpointer)

    def _save(self) -> None:
        state = {
            "step": self._step,
            "history": self._journal.history.state_dict(),
            "loss": self._loss.state_dict(),
            "drift": self._drift.state_dict(),
            "guard": self._guard.state_dict(),
            "lr_scheduler": self._lr_scheduler.state_dict() if self._lr_scheduler is not None else None,
        }
        self._folder.save(self._step, self._model, self._optimizer, state, self._cfg)

    def _resume(self, checkpoint: Any) -> None:
        state = load_checkpoint(checkpoint, self._model, self._optimizer)
        self._step = state["step"]
        self._journal.history.load_state_dict(state["history"])
        self._loss.load_state_dict(state["loss"])
        self._drift.load_state_dict(state["drift"])
        self._guard.load_state_dict(state["guard"])
        if self._lr_scheduler is not None:
            restore_schedule(self._lr_scheduler, state["lr_scheduler"])
        restore_rng(state["rng"])
        print(f"Resuming after step {self._step}, from {checkpoint}")


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """On-policy representation distillation on one device."""
    return run_recipe(OPRDRecipe, cfg)


if __name__ == "__main__":
    sys.exit(recipe_main())
