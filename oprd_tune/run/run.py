"""Everything around a recipe's steps: its folder, logs, evaluations, checkpoints, signals and end."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from oprd_tune.config import OPRDSettings, Parts
from oprd_tune.errors import ConfigError
from oprd_tune.metrics.step import StepResult
from oprd_tune.preflight.data import RunData
from oprd_tune.preflight.pair import ModelPair
from oprd_tune.protocols import RolloutEngine
from oprd_tune.ranks import Ranks
from oprd_tune.rollout import choose_engine
from oprd_tune.run.folder import RunFolder, load_checkpoint, read_config
from oprd_tune.run.journal import Journal
from oprd_tune.run.launch import StopSignals
from oprd_tune.teacher import TeacherPlan
from oprd_tune.training.student import Student

_QUANTISATION_PROMPTS = 8  # that the error of quantisation is measured on


class Run:
    """Drives nothing: a recipe tells it what happened, and it does what a run has to do about that.

        with run:
            while run.goes_on():
                run.record(train_step(prompts of run.step))
        return run.finish()

    Args:
        parts: of the recipe.
        settings: of the recipe.
        ranks: the processes of the run.
        recipe: its name.

    Attributes:
        parts: those of the recipe, with the engine that `auto` stands for.
        step: optimizer steps done.
        checkpoint: what the run resumes from, or None.
        journal: logs, progress and the summary.
        phase: times the phases of a step, as in `with run.phase("rollout")`.

    Raises:
        ConfigError: if the run may not start in its folder, or resume there under this config.
    """

    def __init__(self, parts: Parts, settings: OPRDSettings, ranks: Ranks, *, recipe: str) -> None:
        s = settings
        self._settings, self._ranks, self._recipe = s, ranks, recipe
        self._folder = RunFolder(s.output_dir, s.keep_checkpoints, ranks)
        self.journal = Journal(s, ranks)
        self.phase = self.journal.phase
        self.step = 0
        self._has_begun = False
        self.checkpoint = self._folder.check(resume=s.resume)
        saved = None if self.checkpoint is None else read_config(self.checkpoint)
        engine = None if saved is None else saved["rollout"]["_component_"]
        self.parts = choose_engine(parts, engine, ranks.device, ranks)
        if saved is not None and (changed := self.parts.differences(saved, type(s))):
            raise ConfigError(
                f"resume: {self.checkpoint} was written under another config: {'; '.join(changed)}. Only max_steps, "
                "output_dir, logging, checkpoints and what concerns memory or servers alone may change"
            )

    def open(self) -> None:
        """Make the folder this run's, and construct its logger. From here on, files are written."""
        self._logger = self.parts.metric_logger() if self._ranks.first else None
        self._folder.open(self.parts.record)

    def load_teacher(self, pair: ModelPair, data: RunData, *, top: int | None) -> TransformerDecoder:
        """Load the teacher, and note what quantisation changed in it and, at the start of a run, how accurate it is.

        Args:
            pair: the models' files.
            data: measures accuracy.
            top: the highest layer that the run reads; None for all of the teacher, with its head.
        """
        s = self._settings
        measure = data.teacher_accuracy if self.checkpoint is None and s.evaluate_teacher else None
        teacher, errors = TeacherPlan(s.teacher_placement, s.teacher_quantization, self._ranks).load(
            self.parts.teacher_model,
            pair.teacher_files,
            dtype=s.torch_dtype,
            top=top if measure is None else None,
            prompts=data.prompts.at(range(_QUANTISATION_PROMPTS)).as_teacher_reads,
        )
        self.journal.add_teacher_errors(errors)
        if measure is not None:
            self.journal.history.teacher_accuracy = measure(teacher)
        return teacher

    def begin(self, student: Student, data: RunData, engine: RolloutEngine, **stateful: Any) -> None:
        """Go back to the checkpoint if the run resumes, and start logging. Call it when everything is set up.

        Args:
            student: what trains.
            data: measures it.
            engine: closed at the end.
            stateful: what else a checkpoint has to remember: objects with `state_dict` and `load_state_dict`, by name.
        """
        self._student, self._data, self._engine, self._has_begun = student, data, engine, True
        self._stateful = {
            "history": self.journal.history,
            "drift": student.drift,
            "guard": student.guard,
            "lr_scheduler": student.lr_scheduler,
            **stateful,
        }
        if self.checkpoint is not None:
            self.step = load_checkpoint(
                self.checkpoint,
                student.model,
                student.optimizer,
                self._stateful,
                seed=self._settings.seed,
                ranks=self._ranks,
            )
        self.journal.open(self._logger, data.tokenizer, first_step=self.step + (self.checkpoint is not None))
        if self._logger is not None:
            self._logger.log_config(OmegaConf.create(dict(self.parts.record)))

    # ---- the loop ----

    def __enter__(self) -> Run:
        if self.step == 0 and not self.journal.history.evaluations:
            self._evaluate()
        with ExitStack() as scope:
            scope.enter_context(closing(self._engine))
            self._stop = scope.enter_context(StopSignals())
            self._bar: Any = scope.enter_context(
                tqdm(
                    total=self._settings.max_steps,
                    initial=self.step,
                    desc=self._recipe.partition("_")[0].upper(),
                    unit="step",
                    disable=not self._ranks.first,
                )
            )
            self._scope = scope.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scope.__exit__(kind, error, trace)

    def goes_on(self) -> bool:
        """Whether there is a step to do: not after the last one, nor after a signal. Every rank must call."""
        self._stopped = int(self._ranks.largest(self._stop.received))
        return not self._stopped and self.step < self._settings.max_steps

    def record(self, result: StepResult) -> None:
        """Count a step that is done, log it, and evaluate and save where it is time."""
        s = self._settings
        self.step += 1
        self._student.finish_step(result.metrics)
        self.journal.finish_step(self.step, result)
        done = self.step == s.max_steps
        if done or self.step % s.evaluate_every_n_steps == 0:
            self._evaluate()
        if done or self.step % s.checkpoint_every_n_steps == 0:
            self._save()
        self.journal.show(self._bar, result.loss)

    def save(self) -> None:
        """Write a checkpoint of the last finished step, and wait for it."""
        self._save()
        self._folder.wait()

    def finish(self) -> int:
        """Save and export what a run leaves behind; returns the exit status."""
        if self._stopped:
            self.save()
            print(f"Stopped after step {self.step}; everything is saved. Continue with resume=true.")
            self.journal.close()
            return 128 + self._stopped
        final = self._export("final")
        self._folder.wait()
        s = self._settings
        self.journal.finish(final, recipe=self._recipe, steps=self.step, seed=s.seed, dtype=s.dtype)
        return 0

    def _evaluate(self) -> None:
        """Measure the student, and export it if it is the best so far."""
        data, model = self._data, self._student.model
        accuracy = data.task_accuracy(model) if data.task_accuracy else None
        perplexity = data.reference_perplexity(model) if data.reference_perplexity else None
        if self.journal.add_evaluation(self.step, accuracy, perplexity):
            self._export("best")

    def _save(self) -> None:
        if self._has_begun:  # else nothing has been learned yet
            self._folder.save(self.step, self._student.model, self._student.optimizer, self._stateful)

    def _export(self, name: str) -> Path:
        dtype = self._settings.torch_dtype
        return self._folder.export(name, self._student.model, self.parts.checkpointer.plainly, dtype=dtype)
