"""Held-out accuracy: a model samples answers, and a grader grades them."""

from __future__ import annotations

import torch
from torchtune.modules import TransformerDecoder

from oprd_tune.config.checks import check_seed, check_whole
from oprd_tune.evaluation.texts import decode_responses, need_answers
from oprd_tune.grading.calls import find_grader, grade_all
from oprd_tune.protocols import Grader, PromptSource, Tokenizer
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.native.sampler import Sampler, sampling_bytes
from oprd_tune.types import Prompts, SamplingRequest


class TaskAccuracy:
    """The share of right answers to held-out prompts, sampled at temperature 1 with fixed noise.

    Args:
        dataset: held-out prompts with reference answers. None raises a ConfigError that says what is missing.
        tokenizer: decodes responses.
        grader: a function (response, answer) → bool, or its dotted path, such as `oprd_tune.grading.exact_match`. It
            may be a `protocols.BatchGrader`, which gets all responses at once.
        max_new_tokens: the length limit of an answer.
        samples_per_prompt: the number of answers to each prompt.
        seed: the seed of the noise. Every evaluation uses the same noise, so only the model makes a difference.
        batch_size: the largest number of answers sampled at once.
        vocabulary: sample from the first so many token ids, as in training; None takes all.
        ranks: the processes that share the work.

    Attributes:
        grader: the grader.
        samples: the number of answers that are graded, over all processes.

    Raises:
        ConfigError: if the grader cannot be found or a reference answer is missing.
    """

    def __init__(
        self,
        dataset: PromptSource | None,
        tokenizer: Tokenizer,
        *,
        grader: str | Grader,
        max_new_tokens: int,
        samples_per_prompt: int = 1,
        seed: int = 0,
        batch_size: int = 256,
        vocabulary: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        check_whole("task_accuracy.max_new_tokens", max_new_tokens)
        check_whole("task_accuracy.samples_per_prompt", samples_per_prompt)
        check_whole("task_accuracy.batch_size", batch_size)
        check_seed("task_accuracy.seed", seed)
        self.grader = find_grader("task_accuracy.grader", grader)
        dataset = need_answers(dataset, "task_accuracy")
        self._ranks = ranks or Ranks()
        self.samples = len(dataset) * samples_per_prompt
        own = range(self._ranks.rank, len(dataset), self._ranks.world_size)
        self._counts = bool(own)
        own = own or range(1)  # a rank without a prompt samples too, since every rank must run a sharded model
        rows = [dataset[i] for i in own]
        self._prompts = Prompts(tuple(t for t, _ in rows), tuple(own), tuple(a for _, a in rows))
        self._tokenizer = tokenizer
        self.request = SamplingRequest(
            stop_tokens=tokenizer.stop_tokens,
            pad_id=tokenizer.pad_id,
            max_prompt_tokens=max(map(len, self._prompts.tokens)),
            max_new_tokens=max_new_tokens,
            samples_per_prompt=samples_per_prompt,
            seed=seed,
            vocabulary=vocabulary,
        )
        self._batch_size = min(batch_size, len(rows) * samples_per_prompt)

    def memory_bytes(self, model: TransformerDecoder, dtype: torch.dtype) -> int:
        """Bytes that the sampling of answers takes beside the model's weights."""
        columns = self.request.max_prompt_tokens + self.request.max_new_tokens
        return sampling_bytes(model, rows=self._batch_size, columns=columns, dtype=dtype)

    def __call__(self, model: TransformerDecoder) -> float:
        """The share of right answers, between 0 and 1. Every rank must call."""
        rollout = Sampler(model, self.request, batch_size=self._batch_size).sample(self._prompts)
        responses = decode_responses(rollout.tokens_BS, rollout.response_mask_BS, self._tokenizer)
        repeats = range(self.request.samples_per_prompt)
        answers = [str(answer) for answer in self._prompts.answers for _ in repeats]
        pairs = list(zip(responses, answers, strict=True)) if self._counts else []
        verdicts = self._ranks.agree(lambda: grade_all(self.grader, pairs))
        scored = [sum(verdicts), len(pairs)]
        right, count = self._ranks.total(scored)
        return right / count
