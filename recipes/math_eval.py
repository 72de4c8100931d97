"""Does it reason better? Samples answers of several models to benchmarks, grades them, and compares the models.

Each model answers every problem k times. Avg@k is the mean share of right answers, Best@k the share of problems with a
right one, pass@j the unbiased estimate of it for fewer answers. Intervals are bootstrapped over problems; differences
between models are paired, problem by problem. Stopped at any moment, the same command goes on, with the same samples as
if it had not been stopped. With several processes, each answers its own share of the problems.

    tune run math_eval --config tiny/eval
    tune run math_eval --config aime models.mine=outputs/mine/final models.base=Qwen/Qwen2.5-1.5B
    tune cp math_eval my_eval.py; tune cp tiny/eval my.yaml; tune run my_eval.py --config my.yaml

This file is meant to be copied and edited.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from omegaconf import DictConfig
from torchtune import config
from tqdm import tqdm

from oprd_tune.config import EvalParts, EvalSettings, resolve
from oprd_tune.config.components import check_offers
from oprd_tune.evaluation.candidate import Candidate
from oprd_tune.evaluation.samples import Sample
from oprd_tune.grading.calls import find_grader
from oprd_tune.protocols import RolloutEngine
from oprd_tune.rollout import choose_engine
from oprd_tune.run import join_run, launch
from oprd_tune.run.eval_folder import EvalFolder

RECIPE = "math_eval"


class MathEval:
    """An evaluation of one or several models. Call `setup`, then `train`."""

    goes_on_by = "the same command"

    def __init__(self, cfg: DictConfig) -> None:
        self.settings, parts = resolve(cfg, EvalSettings, recipe=RECIPE, parts=EvalParts)  # the config ends here
        self.ranks = join_run(self.settings)
        self.parts = choose_engine(parts, None, self.ranks.device, self.ranks)

    def setup(self) -> None:
        """Check everything: models, benchmarks, grader and engine. No weights are read."""
        s, parts = self.settings, self.parts
        self.grader = find_grader("grader", s.grader)
        self.candidates = [Candidate.open(name, where, parts.benchmarks, s) for name, where in s.models.items()]
        self.new_engine()
        self.folder = EvalFolder(s.output_dir, parts.record, self.ranks)

    def new_engine(self) -> RolloutEngine:
        """An engine that has not started yet."""
        engine: RolloutEngine = self.parts.rollout()
        check_offers("rollout", engine, RolloutEngine)
        engine.check(self.ranks.device, self.ranks)
        return engine

    def train(self) -> int:
        """Sample and grade what is missing, then report; returns the exit status."""
        s = self.settings
        k, at_once = s.samples_per_problem, s.problems_per_batch * self.ranks.world_size
        for candidate in self.candidates:
            work = [
                (benchmark, batch)
                for benchmark, size in candidate.problems.sizes.items()
                for batch in split(self.folder.missing(candidate.name, benchmark, size, k), at_once)
            ]
            if not work:
                continue
            with self.started(candidate) as engine:
                for benchmark, problems in tqdm(work, desc=candidate.name, unit="batch", disable=not self.ranks.first):
                    answer = partial(self.answer, engine, candidate, benchmark, problems)
                    self.folder.add(self.ranks.agree(answer))
        if self.ranks.first:
            self.folder.report([candidate.name for candidate in self.candidates], self.parts.metric_logger())
        return 0

    def answer(self, engine: RolloutEngine, candidate: Candidate, benchmark: str, problems: list[int]) -> list[Sample]:
        """Sample this process's share of some problems, and grade the responses."""
        own = problems[self.ranks.rank :: self.ranks.world_size]
        if not own:
            return []
        return candidate.problems.answers(benchmark, own, engine.generate, model=candidate.name, grader=self.grader)

    @contextmanager
    def started(self, candidate: Candidate) -> Iterator[RolloutEngine]:
        """Within the scope, an engine that samples with a candidate's weights."""
        policy = candidate.load(self.settings, self.ranks, self.folder.path / "engine")
        engine = self.new_engine()
        engine.start(policy, candidate.problems.request)
        engine.sync_weights(0)
        try:
            yield engine
        finally:
            engine.close()
            del engine, policy
            if self.ranks.device.type == "cuda":
                torch.cuda.empty_cache()

    def save(self) -> None:
        """Nothing: each batch is saved as soon as it is graded."""


def split(problems: list[int], size: int) -> list[list[int]]:
    """Batches of at most `size` problems."""
    return [problems[start : start + size] for start in range(0, len(problems), size)]


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """Avg@k and Best@k of several models on several benchmarks."""
    return launch(MathEval, cfg)


if __name__ == "__main__":
    sys.exit(recipe_main())
