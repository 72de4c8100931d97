"""On-policy representation distillation (OPRD, arXiv 2606.06021), from a laptop CPU to several hosts of GPUs.

The student answers prompts itself. A teacher reads the same tokens, and the student's hidden states are pulled
towards the teacher's at chosen layers (Eq. 6), as they are or through a bridge. No LM head runs for the loss, on either
side. With several processes, each samples and trains on its own share of the prompts.

    tune run oprd_distributed --config tiny/oprd                            # one process for each GPU, or a CPU
    tune run --nproc_per_node 2 oprd_distributed --config tiny/oprd         # any option of torchrun
    tune cp oprd_distributed my_recipe.py; tune cp tiny/oprd my.yaml; tune run my_recipe.py --config my.yaml

This file is meant to be copied and edited. `train_step` is the method; `setup` is a list of its parts.
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig
from torchtune import config

from oprd_tune.config import OPRDSettings, resolve
from oprd_tune.errors import ConfigError
from oprd_tune.losses import HiddenStateLoss
from oprd_tune.losses.masking import StateSelector
from oprd_tune.metrics import Metrics, StepResult
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.preflight import load_data, load_pairs, preflight
from oprd_tune.run import Run, join_run, launch
from oprd_tune.training.bridge_fit import check_bridges
from oprd_tune.training.calibration import calibrate
from oprd_tune.training.culprit import culprit_named
from oprd_tune.training.diagnosis import Diagnosis
from oprd_tune.training.engine_start import start_engine
from oprd_tune.training.student import Student
from oprd_tune.training.teachers import load_teachers
from oprd_tune.types import Prompts

RECIPE = "oprd_distributed"


class OPRDRecipe:
    """OPRD on any number of devices. Call `setup`, then `train`."""

    def __init__(self, cfg: DictConfig) -> None:
        self.settings, parts = resolve(cfg, OPRDSettings, recipe=RECIPE)  # the config ends here
        self.ranks = join_run(self.settings)
        self.run = Run(parts, self.settings, self.ranks, recipe=RECIPE)

    def train_step(self, prompts: Prompts) -> StepResult:
        """One optimizer step on this process's prompts."""
        run, metrics = self.run, Metrics()
        sampled = run.sample(prompts)  # or an error, which leaves the step undone
        sampled = self.data.read(sampled, prompts)  # adds what the teacher reads, if that is something else
        rollout = sampled.without_truncated(self.settings.truncated_responses)
        # One denominator for the whole step, over all processes and microbatches, known before the first backward.
        count = self.ranks.sum(self.select(rollout).count)
        if count == 0:
            return StepResult(None, sampled, metrics)
        if self.diagnosis.is_due(run.step + 1):
            with run.phase("diagnosis"):
                metrics.merge(self.diagnosis(rollout))
        micro_batches = self.student.micro_batches(rollout)
        # Does nothing, but in the first step of a loss normalised by `rms`.
        calibrate(self.loss, self.teachers, micro_batches, self.select, self.ranks)
        # Before the loop, because counting waits for the device. Within it, nothing does.
        selections = [self.select(micro) for micro in micro_batches]

        for micro, selection in zip(micro_batches, selections, strict=True):
            teacher = self.teachers.of(micro)
            with run.phase("teacher"):
                targets = teacher.targets(micro, selection.teacher_index_T)
            with run.phase("student"):
                stream = self.loss.stream(teacher.pairs, targets.states, selection, teacher.bridge)
                with layer_taps(self.student.model, stream.layers, stream):
                    loss_sum = micro.read_by(self.student.model)  # the last tap stands where the LM head was
                self.student.backward(loss_sum, count, last=micro is micro_batches[-1], teacher=teacher.name)
            teacher.merge(metrics, stream.metrics)

        step = (self.student.model, self.teachers, micro_batches, self.select, self.ranks)
        with run.phase("optimizer"), culprit_named(*step):
            loss = self.student.update(run.step + 1, metrics)
        return StepResult(loss, sampled, metrics)

    def setup(self) -> None:
        """Check everything, then load it. What can be wrong is found before weights are read."""
        s, run, parts = self.settings, self.run, self.run.parts
        self.select = StateSelector(s.positions, s.positions_k, s.anchor, s.average_over)
        self.engine = run.make_engine()
        self.loss = parts.loss()
        if not isinstance(self.loss, HiddenStateLoss):
            raise ConfigError(f"{type(self.loss).__name__} is no loss on hidden states; opd_topk_distributed takes it")
        if s.compile:
            self.loss.compile()
        pairs = load_pairs(parts, s)  # the student with its teacher, or with each of several
        self.data = load_data(parts, s, pairs, self.ranks)
        check_bridges(self.loss, pairs)
        preflight(parts, s, pairs, self.data, self.loss, self.engine)

        run.open()
        self.student = Student(parts, s, pairs.student_files, self.ranks, top=pairs.top, trains_head=False)
        start_engine(self.engine, self.student, pairs, self.data, s)
        taught = (pairs, self.data, self.student, self.engine, self.select)
        self.teachers = load_teachers(run.load_teacher, *taught, token_loss=False)
        self.diagnosis = Diagnosis(self.student.model, self.teachers, s, self.ranks)
        run.begin(self.student, self.data, self.engine, loss=self.loss)

    def train(self) -> int:
        """Run to `max_steps`, or until a signal; returns the exit status."""
        with self.run as run:
            while run.goes_on():
                run.record(self.train_step(self.data.prompts.at_step(run.step)))
        return self.run.finish()

    def save(self) -> None:
        """Write a checkpoint of the last finished step."""
        self.run.save()


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """On-policy representation distillation on any number of devices."""
    return launch(OPRDRecipe, cfg)


if __name__ == "__main__":
    sys.exit(recipe_main())
