"""Everything around a recipe's steps: the run's folder, logs, evaluations, checkpoints, signals and end."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from oprd_tune.config import OPRDSettings, Parts
from oprd_tune.config.components import check_offers
from oprd_tune.errors import CheckpointError, ConfigError
from oprd_tune.evaluation.samples import Sample
from oprd_tune.metrics.step import StepResult
from oprd_tune.preflight.data import RunData
from oprd_tune.preflight.pair import ModelPair
from oprd_tune.preflight.teacher_data import TeacherData
from oprd_tune.protocols import MetricLogger, RolloutEngine
from oprd_tune.ranks import Ranks
from oprd_tune.rollout import choose_engine
from oprd_tune.rollout.native.sampler import Sampler
from oprd_tune.run.folder import RunFolder
from oprd_tune.run.journal import Journal
from oprd_tune.run.launcher import FAILED, StopSignals
from oprd_tune.run.records import read_config
from oprd_tune.run.restore import load_checkpoint
from oprd_tune.run.rollouts import Rollouts
from oprd_tune.teacher import TeacherPlan
from oprd_tune.training.student import Student
from oprd_tune.types import Prompts, Rollout

_QUANTISATION_PROMPTS = 8  # the error of quantisation is measured on that many prompts


class Run:
    """Logs, evaluates, checkpoints and exports. The recipe drives the loop and reports each step that it has done.

        with run:
            while run.goes_on():
                run.record(train_step(prompts of run.step))
        return run.finish()

    Attributes:
        parts: the recipe's components, with the chosen engine in place of `auto`.
        step: the number of finished optimizer steps.
        checkpoint: the checkpoint that the run resumes from, or None.
        journal: writes logs, progress and the summary.
        phase: times the phases of a step, as in `with run.phase("rollout")`.

    Raises:
        ConfigError: if the run may not start in its folder, or may not resume there under this config.
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
        engine = None if saved is None else str(saved.get("rollout", {}).get("_component_"))
        self.parts = choose_engine(parts, engine, ranks.device, ranks)
        if saved is not None and (changed := self.parts.differences(saved, type(s))):
            raise ConfigError(
                f"resume: {self.checkpoint} was written under another config: {'; '.join(changed)}. Only max_steps, "
                "output_dir, logging, checkpoints and what concerns memory or servers alone may change"
            )

    def make_engine(self) -> RolloutEngine:
        """Construct the config's engine. What keeps it from working here is found before any model is loaded."""
        engine: RolloutEngine = self.parts.rollout()
        check_offers("rollout", engine, RolloutEngine)
        if self.parts.eval is not None:
            _check_takes_requests(engine)
        engine.check(self._ranks.device, self._ranks)
        return engine

    def open(self) -> None:
        """Construct the logger and claim the folder for this run. From here on, files are written."""
        self._logger = self._ranks.agree(self._make_logger, ConfigError)
        self._folder.open(self.parts.record)

    def _make_logger(self) -> MetricLogger | None:
        """The first rank's logger; None on the others."""
        if not self._ranks.first:
            return None
        logger: MetricLogger = self.parts.metric_logger()
        check_offers("metric_logger", logger, MetricLogger)
        return logger

    def load_teacher(
        self, pair: ModelPair, data: TeacherData, student: Student, *, top: int | None
    ) -> TransformerDecoder:
        """Load a teacher and record the error of its quantisation. A run that starts also measures how good it is.

        With `teacher_weights: live` that is the student's model, and nothing is loaded. `top` is the highest layer that
        the run reads; None stands for the whole teacher with its head.
        """
        s = pair.settings
        starts = self.checkpoint is None
        measure = data.accuracy if starts and s.evaluate_teacher else None
        benchmarks = data.benchmarks if starts else None
        if s.teacher_is_student:
            teacher = student.model
        else:
            teacher, errors = TeacherPlan(s.teacher_placement, s.teacher_quantization, self._ranks).load(
                pair.parts.teacher_model,
                pair.teacher_files,
                dtype=s.torch_dtype,
                top=top if measure is None and benchmarks is None else None,
                prompts=data.prompts.at(range(_QUANTISATION_PROMPTS)).as_teacher_reads,
            )
            self.journal.add_teacher_errors(errors, pair.name)
        if measure is not None:
            self.journal.add_teacher_accuracy(measure(teacher), pair.name)
        if benchmarks is not None:
            sampler = Sampler(teacher, benchmarks.request, batch_size=benchmarks.rows)
            self.journal.add_teacher_samples(benchmarks(sampler.sample, "teacher"))
        return teacher

    def begin(self, student: Student, data: RunData, engine: RolloutEngine, **stateful: Any) -> None:
        """Load the checkpoint if the run resumes, and start logging. Call it when everything is set up.

        Args:
            student: the student to train.
            data: measures the student.
            engine: samples responses. The run closes it at the end.
            stateful: further objects that a checkpoint saves, by name. Each has `state_dict` and `load_state_dict`.
        """
        s = self._settings
        self._student, self._data, self._engine, self._has_begun = student, data, engine, True
        self._rollouts = Rollouts(
            engine, data.prompts, self._ranks, last=s.max_steps, phase=self.phase, references=data.references
        )
        if self._rollouts.ahead:  # after the forward passes, so that nothing waits for the proof
            student.optimizer.register_step_pre_hook(lambda *_: self._rollouts.prove())
        self._stateful = {
            "history": self.journal.history,
            "drift": student.drift,
            "guard": student.guard,
            "lr_scheduler": student.lr_scheduler,
            "rollouts": self._rollouts if self._rollouts.ahead else None,
            **stateful,
        }
        if self.checkpoint is not None:
            self.step = load_checkpoint(
                self.checkpoint,
                student.model,
                student.optimizer,
                self._stateful,
                average=student.average,
                seed=s.seed,
                ranks=self._ranks,
            )
        if data.teacher_benchmarks is not None and self.step and not self.journal.history.teacher_benchmarks:
            print("eval.teacher: the teacher is asked before the first step only, so this run goes on without it")
        if self.checkpoint is not None and self.step >= s.max_steps:
            print(f"resume: step {self.step} is done, and max_steps is {s.max_steps}: nothing is left to train")
        self.journal.open(self._logger, data, first_step=self.step + (self.checkpoint is not None))
        if self._logger is not None:
            self._logger.log_config(OmegaConf.create(dict(self.parts.record)))

    # ---- the loop ----

    def __enter__(self) -> Run:
        with ExitStack() as scope:
            scope.enter_context(closing(self._engine))
            if all(row["step"] != self.step for row in self.journal.history.evaluations):
                self._evaluate()
            self._stop = scope.enter_context(StopSignals())
            name = self._recipe.partition("_")[0].upper()
            total = self._settings.max_steps
            bar = tqdm(total=total, initial=self.step, desc=name, unit="step", disable=not self._ranks.first)
            self._bar = scope.enter_context(bar)
            self._scope = scope.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._scope.__exit__(*error)

    def goes_on(self) -> bool:
        """Whether to do another step: false after the last step, and after a signal. Every rank must call."""
        self._stopped = int(self._ranks.largest(self._stop.received))
        return not self._stopped and self.step < self._settings.max_steps

    def sample(self, prompts: Prompts) -> Rollout:
        """Sample responses to the step's prompts with the student's weights, or with those of the step before.

        The latter, where `rollout.ahead` is 1, were sampled while that step trained. Raises RolloutError, which leaves
        the step undone.
        """
        return self._rollouts.of_step(self.step, prompts)

    def record(self, result: StepResult) -> None:
        """Count and log a finished step. Evaluate and save if it is time for that."""
        s = self._settings
        self.step += 1
        self._student.finish_step(result.metrics)
        self.journal.finish_step(self.step, result)
        done = self.step == s.max_steps
        self._evaluate()
        if done or self.step % s.checkpoint_every_n_steps == 0:
            self._save()
        self.journal.show(self._bar, result.loss)

    def save(self) -> None:
        """Write a checkpoint of the last finished step, and wait until it is complete."""
        self._save()
        self._folder.wait()

    def finish(self) -> int:
        """Export the final student and write the summary, or save after a signal; returns the exit status.

        That is 0, or 3 if the student never changed or is worse than it was, or 128 and the number of the signal.
        """
        if self._stopped:
            self.save()
            print(f"Stopped after step {self.step}; everything is saved. Continue with resume=true.")
            self.journal.close()
            self._folder.release()
            return 128 + self._stopped
        try:
            self._folder.wait()  # first: a run that is killed between the two could not resume beside `final` alone
        except CheckpointError:
            self._export("final")
            raise
        final = self._export("final")
        succeeded = self.journal.finish(final, recipe=self._recipe, steps=self.step)
        self._folder.release()
        return int(self._ranks.largest(0 if succeeded else FAILED))  # no rank ends while the first one still writes

    def _evaluate(self) -> None:
        """Measure the student if it is time for that, and export it if it is the best student so far."""
        data, model, done = self._data, self._student.model, self.step == self._settings.max_steps
        held_out = done or self.step % self._settings.evaluate_every_n_steps == 0
        benchmarks = data.benchmarks
        if benchmarks is not None and not done and self.step % benchmarks.section.every_n_steps:
            benchmarks = None
        if not held_out and benchmarks is None:
            return
        accuracy = data.task_accuracy(model) if held_out and data.task_accuracy else None
        perplexity = data.reference_perplexity(model) if held_out and data.reference_perplexity else None
        samples: list[Sample] = []
        if benchmarks is not None:
            self._engine.sync_weights(self.step)
            samples = benchmarks(partial(self._engine.generate, request=benchmarks.request), "student")
        if self.journal.add_evaluation(self.step, accuracy, perplexity, samples):
            self._export("best")

    def _save(self) -> None:
        if self._has_begun and self.step > self.journal.history.skipped_steps:  # before that, nothing has been learned
            self._rollouts.gather()
            student = self._student
            self._folder.save(self.step, student.model, student.optimizer, self._stateful, average=student.average)

    def _export(self, name: str) -> Path:
        make_checkpointer = self.parts.checkpointer.plainly
        return self._folder.export(name, self._student.model, make_checkpointer, dtype=self._settings.torch_dtype)


def _check_takes_requests(engine: RolloutEngine) -> None:
    """Raise ConfigError if an engine, written before there were any, takes no further requests."""
    asked, started = (signature(method).parameters for method in (engine.generate, engine.start))
    if "request" not in asked or all(p.kind is not p.VAR_POSITIONAL for p in started.values()):
        raise ConfigError(
            f"eval: {type(engine).__name__} cannot answer benchmarks: its `generate` has to take a `request`, and its "
            "`start` further ones; oprd_tune/protocols.py describes both"
        )
