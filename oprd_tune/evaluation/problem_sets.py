"""Benchmarks as one model reads them, and its answers as graded samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from oprd_tune.config import Component
from oprd_tune.config.components import check_offers
from oprd_tune.errors import ConfigError
from oprd_tune.evaluation.samples import Sample
from oprd_tune.evaluation.texts import decode_responses
from oprd_tune.grading.calls import grade_all
from oprd_tune.metrics.step import distinct_share
from oprd_tune.protocols import Grader, PromptSource, Tokenizer
from oprd_tune.types import Prompts, Rollout, SamplingRequest


@dataclass(frozen=True)
class ProblemSets:
    """The problems of several benchmarks in a model's tokens, and what the model is asked to sample.

    Attributes:
        sets: the benchmarks by name.
        sizes: for each of them, how many problems take part: the first so many.
        tokenizer: the model's.
        request: `max_prompt_tokens` is the length of the longest problem; none is dropped.
    """

    sets: Mapping[str, PromptSource]
    sizes: Mapping[str, int]
    tokenizer: Tokenizer
    request: SamplingRequest

    @classmethod
    def open(
        cls,
        key: str,
        benchmarks: Mapping[str, Component],
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int,
        samples_per_problem: int,
        seed: int,
        first: int | None = None,
        temperature: float | None = None,
        vocabulary: int | None = None,
    ) -> ProblemSets:
        """Read benchmarks. `key` is their config key; the other arguments are those of `SamplingRequest`.

        Raises:
            ConfigError: if a benchmark cannot be read or has no reference answers.
        """
        sets: dict[str, PromptSource] = {name: component(tokenizer) for name, component in benchmarks.items()}
        for name, found in sets.items():
            check_offers(f"{key}.{name}", found, PromptSource)
            if not found.has_answers:
                raise ConfigError(f"{key}.{name} has no reference answers; give answer_column")
        sizes = {name: len(found) if first is None else min(first, len(found)) for name, found in sets.items()}
        request = SamplingRequest(
            stop_tokens=tokenizer.stop_tokens,
            pad_id=tokenizer.pad_id,
            max_prompt_tokens=max(len(sets[name][i][0]) for name, size in sizes.items() for i in range(size)),
            max_new_tokens=max_new_tokens,
            samples_per_prompt=samples_per_problem,
            seed=seed,
            vocabulary=vocabulary,
            temperature=temperature,
        )
        return cls(sets, sizes, tokenizer, request)

    def check_fit(self, key: str, *, vocabulary: int, context: int) -> None:
        """Raise ConfigError if a model lacks an id, or cannot hold the longest problem with its longest answer.

        Args:
            key: the config key that messages begin with.
        """
        largest = max(max(found[i][0]) for name, found in self.sets.items() for i in range(self.sizes[name]))
        if largest >= vocabulary:
            raise ConfigError(
                f"{key}: the tokenizer gives the id {largest}, but the model has {vocabulary} tokens; it is another "
                "model's"
            )
        if self.request.longest_row > context:
            raise ConfigError(
                f"{key}: the longest problem has {self.request.max_prompt_tokens} tokens, and max_new_tokens is "
                f"{self.request.max_new_tokens}; together they exceed the context of {context}. Lower "
                "max_new_tokens"
            )

    def prompts(self, name: str, problems: Sequence[int]) -> Prompts:
        """Some problems of a benchmark, as an engine takes them. Noise depends on the problem alone."""
        rows = [self.sets[name][i] for i in problems]
        return Prompts(tuple(tokens for tokens, _ in rows), tuple(problems), tuple(answer for _, answer in rows))

    def answers(
        self, name: str, problems: Sequence[int], sample: Callable[[Prompts], Rollout], *, model: str, grader: Grader
    ) -> list[Sample]:
        """Sample a model's answers to some problems of a benchmark, and grade them.

        Args:
            sample: samples as `request` says.
            model: the model's name in the samples.
        """
        prompts, start = self.prompts(name, problems), time.perf_counter()
        rollout = sample(prompts)
        seconds = (time.perf_counter() - start) / len(rollout)
        responses = decode_responses(rollout.tokens_BS, rollout.response_mask_BS, self.tokenizer)
        texts = [self.tokenizer.decode(list(tokens), skip_special_tokens=False) for tokens in prompts.tokens]
        k = self.request.samples_per_prompt
        references = [str(answer) for answer in prompts.answers for _ in range(k)]
        verdicts = grade_all(grader, list(zip(responses, references, strict=True)))
        samples = []
        for row, (response, right) in enumerate(zip(responses, verdicts, strict=True)):
            tokens = rollout.tokens_BS[row][rollout.response_mask_BS[row]].tolist()
            samples.append(
                Sample(
                    model=model,
                    benchmark=name,
                    problem=problems[row // k],
                    number=row % k,
                    right=right,
                    tokens=len(tokens),
                    truncated=bool(rollout.truncated_B[row]),
                    distinct=distinct_share(tokens),
                    seconds=seconds,
                    prompt=texts[row // k],
                    answer=references[row],
                    response=response,
                )
            )
        return samples
