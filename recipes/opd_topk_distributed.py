"""On-policy distillation with token losses, from a laptop CPU to several hosts of GPUs: top-k, sampled, full, vOPD.

The student answers prompts itself. A teacher reads the same tokens, and next-token distributions are compared at
every response token, KL(student ‖ teacher). Both LM heads run on a chunk of tokens at a time, or on a few rows only, at
the end of one student forward and one teacher forward; nothing of size tokens × vocabulary exists. A composite also
compares hidden states, as they are or through a bridge. With several processes, each has its own share of the prompts.

    tune run opd_topk_distributed --config tiny/opd_topk                        # one process for each GPU, or a CPU
    tune run --nproc_per_node 2 opd_topk_distributed --config tiny/opd_topk     # any option of torchrun
    tune cp opd_topk_distributed my_recipe.py; tune cp tiny/opd_topk my.yaml; tune run my_recipe.py --config my.yaml

This file is meant to be copied and edited. `train_step` is the method; `setup` is a list of its parts.
"""

from __future__ import annotations

import math
import sys

import torch
from omegaconf import DictConfig
from torchtune import config

from oprd_tune.config import OPRDSettings, resolve
from oprd_tune.errors import ConfigError
from oprd_tune.losses.composite import as_composite
from oprd_tune.losses.diagnostics import Probe
from oprd_tune.losses.masking import StateSelector
from oprd_tune.metrics import Metrics, StepResult
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.preflight import load_data, load_pairs, preflight
from oprd_tune.run import Run, join_run, launch
from oprd_tune.selection import ResponseTokens
from oprd_tune.training.bridge_fit import check_bridges
from oprd_tune.training.calibration import calibrate
from oprd_tune.training.culprit import culprit_named
from oprd_tune.training.engine_start import start_engine
from oprd_tune.training.rewards import Rewards
from oprd_tune.training.student import Student
from oprd_tune.training.teachers import TeacherSide, load_teachers
from oprd_tune.types import Prompts, Rollout, TeacherTargets

RECIPE = "opd_topk_distributed"


class OPDRecipe:
    """Output-space distillation on any number of devices. Call `setup`, then `train`."""

    def __init__(self, cfg: DictConfig) -> None:
        self.settings, parts = resolve(cfg, OPRDSettings, recipe=RECIPE)  # the config ends here
        self.ranks = join_run(self.settings)
        self.run = Run(parts, self.settings, self.ranks, recipe=RECIPE)

    def train_step(self, prompts: Prompts) -> StepResult:
        """One optimizer step on this process's prompts."""
        run, metrics = self.run, Metrics()
        sampled = run.sample(prompts)  # or an error, which leaves the step undone
        sampled = self.data.read(sampled, prompts)  # adds what the teacher reads, if that is something else
        if self.rewards.needed:
            with run.phase("grading"):
                sampled = self.rewards(sampled, prompts, metrics)
        rollout = sampled.without_truncated(self.settings.truncated_responses)
        # One denominator a part for the whole step, over all processes, known before the first backward.
        counts = self.ranks.total(self.loss.counts(rollout, self.select))
        if not any(counts):
            return StepResult(None, sampled, metrics)
        count_P = torch.tensor(counts, device=self.ranks.device).clamp(min=1)  # a part may have nothing to read
        micro_batches = self.student.micro_batches(rollout)
        # Does nothing, but in the first step of a loss normalised by `rms`.
        calibrate(self.loss.hidden, self.teachers, micro_batches, self.select, self.ranks)
        # Before the loop, because counting waits for the device. Within it, only top-k does, to count tokens, and
        # losses that leave out samples or reference answers.
        chosen = [(self.select.tokens(micro), self.select(micro)) for micro in micro_batches]

        for micro, (tokens, selection) in zip(micro_batches, chosen, strict=True):
            teacher = self.teachers.of(micro)
            with run.phase("teacher"):
                targets = teacher.targets(micro, selection.teacher_index_T, tokens.teacher_index_T)
            with run.phase("student"):
                stream = self.loss.stream(
                    *(targets, tokens, selection),
                    heads=teacher.heads,
                    pairs=teacher.pairs,
                    bridge=teacher.bridge,
                    probe=self.probe(teacher, targets, tokens, micro, rollout),
                )
                with layer_taps(self.student.model, stream.layers, stream):
                    sum_P = micro.read_by(self.student.model)  # each part's sum over tokens, weighted
                self.student.backward(sum_P, count_P, last=micro is micro_batches[-1], teacher=teacher.name)
            teacher.merge(metrics, stream.metrics)

        step = (self.student.model, self.teachers, micro_batches, self.select, self.ranks)
        with run.phase("optimizer"), culprit_named(*step, final=True):
            loss = self.student.update(run.step + 1, metrics, part_names=self.loss.parts)
        return StepResult(loss, sampled, metrics)

    def probe(
        self, teacher: TeacherSide, targets: TeacherTargets, tokens: ResponseTokens, micro: Rollout, rollout: Rollout
    ) -> Probe | None:
        """Every so many steps, a look at both whole distributions at some of the microbatch's tokens."""
        s = self.settings
        every = s.diagnostics_every_n_steps if teacher.has_head else None
        if every is None or (self.run.step + 1) % every:
            return None
        assert targets.final_TC is not None
        assert teacher.heads is not None
        everywhere = rollout.response_tokens * self.ranks.world_size
        share = math.ceil(s.diagnostics_tokens * len(tokens) / everywhere)
        return Probe(teacher.heads, targets.final_TC, tokens, micro, count=share, k=s.diagnostics_k)

    def setup(self) -> None:
        """Check everything, then load it. What can be wrong is found before weights are read."""
        s, run, parts = self.settings, self.run, self.run.parts
        self.select = StateSelector(s.positions, s.positions_k, s.anchor, s.average_over)
        self.engine = run.make_engine()
        self.loss = as_composite(parts.loss())
        if not self.loss.token_losses:
            raise ConfigError("loss has no token part; losses on hidden states alone are for oprd_distributed")
        if s.compile:
            self.loss.compile()
        # The student with its teacher, or with each of several.
        losses = {"hidden_loss": self.loss.hidden is not None, "compares_tokens": self.loss.compares_tokens}
        pairs = load_pairs(parts, s, **losses, token_loss=True)
        self.loss.check(pairs.vocabulary, self.engine, references=s.takes_references)
        self.data = load_data(parts, s, pairs, self.ranks)
        self.rewards = Rewards(self.loss, self.data, s)
        check_bridges(self.loss.hidden, pairs)
        preflight(parts, s, pairs, self.data, self.loss, self.engine)

        run.open()
        self.student = Student(parts, s, pairs.student_files, self.ranks, top=pairs.depth, trains_head=True)
        start_engine(self.engine, self.student, pairs, self.data, s, top_k_ids=self.loss.sampler_top_k)
        taught = (pairs, self.data, self.student, self.engine, self.select)
        self.teachers = load_teachers(run.load_teacher, *taught, token_loss=True)
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
    """On-policy distillation with token losses on any number of devices."""
    return launch(OPDRecipe, cfg)


if __name__ == "__main__":
    sys.exit(recipe_main())
