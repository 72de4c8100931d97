"""What a run reports: the metrics of each step, evaluations, progress, and the summary at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from oprd_tune.config import ONLY_TEACHER, OPRDSettings
from oprd_tune.evaluation import AccuracyByTeacher
from oprd_tune.evaluation.during_training import metrics_of, results_of
from oprd_tune.evaluation.samples import Sample, SampleFile
from oprd_tune.evaluation.texts import differences_as_markdown, samples_as_markdown
from oprd_tune.losses.diagnostics import DIFFERENCES
from oprd_tune.metrics.history import History
from oprd_tune.metrics.phases import PhaseTimer, peak_memory_bytes
from oprd_tune.metrics.remarks import failure, remarks
from oprd_tune.metrics.step import Metrics, StepResult, rollout_metrics, speed_metrics
from oprd_tune.metrics.step_log import StepLog, keep_lines
from oprd_tune.preflight.data import RunData
from oprd_tune.protocols import MetricLogger, RichLogger
from oprd_tune.ranks import Ranks
from oprd_tune.run.summary import as_table, summarise, write_summary

_GIB = 2**30
_SAMPLES = 4  # responses that are logged as texts
_ANSWERS = "eval_samples.jsonl"  # every answer to a benchmark, with its verdict and the step


class Journal:
    """Collects what happens in a run, for the logger, the progress bar and the run's folder. The first rank writes.

    Attributes:
        history: the course of the run; checkpoints contain it.
        phase: times the phases of a step.
        logged: the metrics of the last finished step.
    """

    def __init__(self, settings: OPRDSettings, ranks: Ranks) -> None:
        self._settings, self._ranks = settings, ranks
        self.history = History()
        self.phase = PhaseTimer(ranks.device)
        self.logged: dict[str, float] = {}
        self._logger: MetricLogger | None = None
        self._log: StepLog | None = None
        self._answers: SampleFile | None = None
        self._teacher_answers: Sequence[Sample] = ()
        self._graded: int | None = None  # answers of an evaluation
        self._once: dict[str, float] = {}  # metrics of the first row of the run, not of a resumption's

    def open(self, logger: MetricLogger | None, data: RunData, *, first_step: int) -> None:
        """Start logging.

        Args:
            logger: the first rank's logger; None on the other ranks.
            data: decodes and grades the samples that are logged.
            first_step: the next step to log. Entries that a crashed run left at this step or later are hidden, and so
                are those of evaluations that are not in `history`.
        """
        self._logger, self._data = logger, data
        self._graded = getattr(data.task_accuracy, "samples", None)  # an evaluator of the user's may lack it
        if isinstance(data.task_accuracy, AccuracyByTeacher):
            self.history.teacher_accuracy = data.task_accuracy.of_all(self.history.teacher_accuracies)
        if self._ranks.first:
            folder, evaluated = Path(self._settings.output_dir), {row["step"] for row in self.history.evaluations}
            self._log = StepLog(folder, first_step=first_step, evaluated=evaluated)
            keep_lines(folder / _ANSWERS, lambda line: line["step"] < first_step and line["step"] in evaluated)
            self._answers = SampleFile(folder / _ANSWERS)
        if isinstance(logger, RichLogger):
            logger.resume_at(first_step)
        elif logger is not None:
            print(f"metric_logger: {type(logger).__name__} takes numbers, but no texts and figures, so there are none")

    def finish_step(self, step: int, result: StepResult) -> None:
        """Reduce a step's metrics over ranks, and log them. The first step is 1. Every rank must call."""
        metrics, history, rollout = result.metrics, self.history, result.rollout
        history.skipped_steps += result.loss is None
        seconds = self.phase.take()
        history.loop_seconds += sum(seconds.values())
        counts = [rollout.sampled.response_tokens, int(rollout.lengths_B.sum())]
        sampled, read = map(int, self._ranks.total(counts))
        history.response_tokens += sampled
        metrics.merge(rollout_metrics(rollout))
        for number, name in enumerate(self._data.teachers):
            if rollout.teacher_B is not None and (rollout.teacher_B == number).any():
                own = rollout_metrics(rollout.of_teacher(number))
                metrics.merge_means(own, prefix=f"teachers/{name}/")
        metrics.merge(speed_metrics(seconds, sampled, read))
        metrics.set("memory/peak", self._ranks.largest(peak_memory_bytes(self._ranks.device)) / _GIB)
        metrics.set("optimizer/skipped_steps", history.skipped_steps)
        self.logged = (self._once if step == self._settings.log_every_n_steps else {}) | metrics.reduce(self._ranks)
        history.add_cosines(step, self.logged)
        history.add_logprob_gap(self.logged)
        history.add_responses(self.logged)
        history.add_kl(self.logged)
        history.not_finite_steps += (
            result.loss is None and "loss/total" in self.logged
        )  # not logged if nothing was read
        if step % self._settings.log_every_n_steps == 0:
            self._write(self.logged, step)
        if step % self._settings.log_samples_every_n_steps == 0:
            self._show_samples(step, result, metrics.reduce_maps(self._ranks))
        self._show_differences(step, metrics)
        self._warn(step)

    def _show_samples(self, step: int, result: StepResult, maps: dict[str, list[list[float]]]) -> None:
        """Log some responses, and where along them student and teacher differ."""
        if not isinstance(self._logger, RichLogger):
            return
        rollout, evaluator = result.rollout.sampled, self._data.task_accuracy
        if len(rollout):
            answers = self._data.prompts.at(rollout.prompt_positions_B[:_SAMPLES].tolist()).answers
            text = samples_as_markdown(rollout, self._data.tokenizer, answers, getattr(evaluator, "grader", None))
            self._logger.log_text("rollout/samples", text, step)
        for name, map_LP in maps.items():
            self._logger.log_figure(name, self.history.map_figure(name, map_LP), step)

    def _show_differences(self, step: int, metrics: Metrics) -> None:
        """Log the tokens at which student and teacher differ most."""
        if isinstance(self._logger, RichLogger) and (found := metrics.notes.get(DIFFERENCES)):
            self._logger.log_text(DIFFERENCES, differences_as_markdown(found, self._data.tokenizer), step)

    def add_teacher_errors(self, errors: dict[int, float], teacher: str) -> None:
        """Record and print the relative error of a teacher's hidden states after quantisation, by teacher layer."""
        if not errors:
            return
        several = teacher != ONLY_TEACHER
        self.history.teacher_errors |= {teacher: errors} if several else errors
        prefix = f"teachers/{teacher}/" if several else ""
        named = {f"{prefix}teacher/quantization_error_{layer:02d}": error for layer, error in errors.items()}
        self._once |= named
        worst = max(errors, key=errors.__getitem__)
        print(
            f"Quantised teacher{f' {teacher}' if several else ''}: relative error of its last hidden state "
            f"{errors[max(errors)]:.2%}, at most {errors[worst]:.2%} (layer {worst})."
        )

    def add_teacher_accuracy(self, accuracy: float, teacher: str) -> None:
        """Record a teacher's accuracy on the held-out prompts that it reads."""
        if teacher == ONLY_TEACHER:
            self.history.teacher_accuracy = accuracy
        else:
            self.history.teacher_accuracies[teacher] = accuracy

    def add_teacher_samples(self, samples: Sequence[Sample]) -> None:
        """Record what the teacher has answered to benchmarks, before anything is trained."""
        results = results_of(samples)
        self.history.teacher_benchmarks = {name: one["avg_at_k"]["value"] for name, one in results.items()}
        self._teacher_answers = samples

    def add_evaluation(
        self, step: int, accuracy: float | None, perplexity: float | None, samples: Sequence[Sample] = ()
    ) -> bool:
        """Record and log an evaluation; returns whether the student has trained and is the best so far.

        Args:
            step: the number of finished optimizer steps.
            accuracy: a fraction, or None if not measured.
            perplexity: the perplexity of reference answers, or None if not measured.
            samples: the student's answers to benchmarks, the same on all ranks; none if it was not asked.
        """
        history, results = self.history, results_of(samples)
        row: dict[str, Any] = {
            "step": step,
            "seconds": history.loop_seconds,
            "accuracy": accuracy,
            "perplexity": perplexity,
        }
        evaluator = self._data.task_accuracy
        by_teacher = evaluator.last if accuracy is not None and isinstance(evaluator, AccuracyByTeacher) else {}
        if by_teacher:
            row |= {"accuracy_by_teacher": by_teacher}
        if results:
            row |= {"benchmarks": results, "avg_at_k": fmean(one["avg_at_k"]["value"] for one in results.values())}
            self._keep_answers(step, samples)
        history.evaluations.append(row)
        teachers = history.teacher_benchmarks
        measured: dict[str, float | None] = {
            "eval/accuracy": accuracy,
            "eval/perplexity": perplexity,
            "eval/teacher_accuracy": history.teacher_accuracy,
            "eval/gap_closed": history.gap_closed(accuracy),
            **{f"teachers/{name}/eval/accuracy": value for name, value in by_teacher.items()},
            **{f"teachers/{name}/eval/teacher_accuracy": value for name, value in history.teacher_accuracies.items()},
            **metrics_of(results),
            **{f"eval/{name}/teacher_avg_at_k": teachers.get(name) for name in results},
        }
        self._write({name: value for name, value in measured.items() if value is not None}, step)
        if history.cosines and isinstance(self._logger, RichLogger):
            self._logger.log_figure("layers/cosine", history.cosine_figure(), step)
        self._warn(step)
        return step > 0 and history.best is history.evaluations[-1]

    def _keep_answers(self, step: int, samples: Sequence[Sample]) -> None:
        """Append answers to `eval_samples.jsonl`; the teacher's stand before the student's first ones."""
        if self._answers is not None:
            self._answers.append([*self._teacher_answers, *samples], step=step)
        self._teacher_answers = ()

    def show(self, bar: Any, loss: float | None) -> None:
        """Advance the progress bar by the finished step."""
        last = self.history.evaluations[-1] if self.history.evaluations else {}
        shown = {"loss": "skipped" if loss is None else f"{loss:.3g}", "tok/s": f"{self.logged['speed/step']:.0f}"}
        shown |= {name: f"{last[name]:.4g}" for name in ("accuracy", "perplexity") if last.get(name) is not None}
        shown |= {name: f"{one['avg_at_k']['value']:.3f}" for name, one in last.get("benchmarks", {}).items()}
        bar.set_postfix(shown, refresh=False)
        bar.update()

    def close(self) -> None:
        """Flush and close the logger."""
        if self._logger is not None:
            self._logger.close()

    def finish(self, student: Path, *, steps: int, **facts: Any) -> bool:
        """Write the summary and its plot, print the summary, and close the logger; returns whether the run succeeded.

        It did not if the student never changed, or if it ended worse than it began. Every rank must call.

        Args:
            student: the folder of the final student.
            steps: the number of optimizer steps.
            facts: what the summary records as well.
        """
        s, ranks = self._settings, self._ranks
        facts |= {"steps": steps, "seed": s.seed, "dtype": s.dtype}
        facts["peak_memory_bytes"] = int(ranks.largest(peak_memory_bytes(ranks.device)))
        summary = summarise(self.history, **facts, device=ranks.device.type, world_size=ranks.world_size)
        summary["graded_answers"] = self._graded
        summary["prompts"] = self._data.counts
        said = self._remarks(ended=True)
        summary["remarks"] = list(said.values())
        summary["failure"] = failure(said, steps=steps, skipped_steps=self.history.skipped_steps)
        self.close()
        if ranks.first:
            folder = Path(s.output_dir)
            write_summary(folder, summary, self.history)
            lines = "".join(f"  ! {sentence}\n" for sentence in said.values())
            lines = lines and f"\n{lines}"
            print(f"\n{as_table(summary)}\n{lines}\n  student     {student}\n  everything  {folder}")
            if summary["failure"] is not None:
                print(f"\nThis run has failed (exit status 3): {summary['failure']}", file=sys.stderr)
        return summary["failure"] is None

    def _write(self, metrics: dict[str, float], step: int) -> None:
        if self._logger is not None:
            self._logger.log_dict(metrics, step)
        if self._log is not None:
            history = self.history
            self._log.add(step, metrics, seconds=history.loop_seconds, tokens=history.response_tokens)

    def _remarks(self, *, ended: bool) -> dict[str, str]:
        return remarks(self.history, max_new_tokens=self._settings.max_new_tokens, graded=self._graded, ended=ended)

    def _warn(self, step: int) -> None:
        """Make each remark once in a run, when it first holds."""
        for kind, sentence in self._remarks(ended=False).items():
            if kind not in self.history.told:
                self.history.told.append(kind)
                if self._ranks.first:
                    tqdm.write(f"step {step}: {sentence}", file=sys.stderr)
