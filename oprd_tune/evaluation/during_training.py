"""Avg@k and Best@k of a model on benchmarks while a run goes on, by all processes of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from oprd_tune.config import Component, EvalSection
from oprd_tune.evaluation.outcome import outcome_of
from oprd_tune.evaluation.problem_sets import ProblemSets
from oprd_tune.evaluation.samples import Sample
from oprd_tune.grading.calls import find_grader
from oprd_tune.metrics.progress import LateBar
from oprd_tune.protocols import Grader, Tokenizer
from oprd_tune.ranks import Ranks
from oprd_tune.types import Prompts, Rollout, SamplingRequest


@dataclass(frozen=True)
class BenchmarkEval:
    """Has a model answer benchmarks. Each evaluation uses the same noise, so only the model makes a difference.

    Attributes:
        problems: the benchmarks in the model's tokens.
        section: the config's section `eval`.
        ranks: the processes that share the problems.
    """

    problems: ProblemSets
    section: EvalSection
    grader: Grader
    ranks: Ranks

    @classmethod
    def open(cls, section: EvalSection, tokenizer: Tokenizer, vocabulary: int, ranks: Ranks) -> BenchmarkEval:
        """Read the benchmarks of a section, and find its grader.

        Raises:
            ConfigError: if a benchmark or the grader cannot be used.
        """
        problems = ProblemSets.open(
            "eval.benchmarks",
            section.benchmarks,
            tokenizer,
            first=section.first,
            max_new_tokens=section.max_new_tokens,
            samples_per_problem=section.samples_per_problem,
            temperature=section.temperature,
            seed=section.seed,
            vocabulary=vocabulary,
        )
        grader = section.grader() if isinstance(section.grader, Component) else section.grader
        return cls(problems, section, find_grader("eval.grader", grader), ranks)

    @property
    def request(self) -> SamplingRequest:
        """What the model is asked to sample."""
        return self.problems.request

    @property
    def rows(self) -> int:
        """The most responses that a process samples at once."""
        largest = -(-max(self.problems.sizes.values()) // self.ranks.world_size)
        return min(self.section.problems_per_batch, largest) * self.request.samples_per_prompt

    def __call__(self, sample: Callable[[Prompts], Rollout], model: str) -> list[Sample]:
        """All samples, in an order that does not depend on the number of processes. Every rank must call.

        Raises RolloutError on all of them if the grader fails on one.

        Args:
            sample: samples this process's share of some problems, as `request` says.
            model: the model's name in the samples.
        """
        ranks, own = self.ranks, []
        batches = list(self._batches())
        for name, batch in LateBar(batches, desc="evaluation", unit="batch", disable=not ranks.first):
            share = batch[ranks.rank :: ranks.world_size]
            # A rank without a problem samples too, since every rank must run a sharded model.
            asked = name, share or batch[:1], sample
            found = ranks.agree(partial(self.problems.answers, *asked, model=model, grader=self.grader))
            own += found if share else []
        place = {name: i for i, name in enumerate(self.problems.sets)}
        everybody = [found for one in ranks.collect(own) for found in one]
        return sorted(everybody, key=lambda s: (place[s.benchmark], s.problem, s.number))

    def _batches(self) -> Iterator[tuple[str, Sequence[int]]]:
        size = self.section.problems_per_batch * self.ranks.world_size
        for name, count in self.problems.sizes.items():
            for start in range(0, count, size):
                yield name, range(start, min(start + size, count))


def results_of(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """What one model reached on each benchmark: the main numbers of `outcome_of`, by benchmark."""
    keys = ("problems", "k", "avg_at_k", "best_at_k", "tokens", "truncated")
    return {name: {key: one[key] for key in keys} for name, own in outcome_of(samples).items() for one in own.values()}


def metrics_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of an evaluation."""
    found: dict[str, float] = {}
    for name, one in results.items():
        found |= {f"eval/{name}/{key}": one[key]["value"] for key in ("avg_at_k", "best_at_k")}
        found |= {f"eval/{name}/tokens": one["tokens"], f"eval/{name}/truncated_share": one["truncated"]}
    return found
