"""How good a model is at the task: held-out accuracy by sampling, perplexity of reference answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path
from torchtune.modules import TransformerDecoder

from oprd_tune.data.prompts import PromptDataset
from oprd_tune.data.tokenizer import HuggingFaceTokenizer
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.head import device_of, token_logprobs
from oprd_tune.modeling.sharding import gathered
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.native import NativeEngine
from oprd_tune.types import Prompts, Rollout


class TaskAccuracy:
    """Share of right answers to held-out prompts, sampled at temperature 1 with fixed noise.

    Args:
        dataset: held-out prompts with reference answers; None is explained.
        tokenizer: decodes responses.
        grader: dotted path of a function (response, answer) → bool, such as `oprd_tune.grading.exact_match`.
        max_new_tokens: length limit of an answer.
        samples_per_prompt: answers to each prompt.
        seed: of the noise; the same at every evaluation, so differences are the model's.
        batch_size: most answers sampled at once.
        vocabulary: sample from the first so many tokens, as in training; None takes all.
        ranks: the processes that share the work; each must call.

    Raises:
        ConfigError: if the grader cannot be found or a reference answer is missing.
    """

    def __init__(
        self,
        dataset: PromptDataset | None,
        tokenizer: HuggingFaceTokenizer,
        *,
        grader: str,
        max_new_tokens: int,
        samples_per_prompt: int = 1,
        seed: int = 0,
        batch_size: int = 256,
        vocabulary: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        try:
            self._grader: Callable[[str, str], bool] = _get_component_from_path(grader)
        except (InstantiationError, ValueError) as error:
            raise ConfigError(f"task_accuracy.grader {grader!r} cannot be found: {error}") from error
        if not callable(self._grader):
            raise ConfigError(f"task_accuracy.grader {grader!r} is no function")
        try:
            self._grader("0", "0")
        except ImportError as error:
            raise ConfigError(f"task_accuracy.grader: {error}") from error
        dataset = _need_answers(dataset, "task_accuracy")
        self._ranks = ranks or Ranks()
        own = range(self._ranks.rank, len(dataset), self._ranks.world_size)
        self._counts = bool(own)
        own = own or range(1)  # a rank without a prompt of its own keeps pace with the others
        rows = [dataset[i] for i in own]
        self._prompts = Prompts(tuple(t for t, _ in rows), tuple(own), tuple(a for _, a in rows))
        self._tokenizer = tokenizer
        self._sampling = {
            "max_new_tokens": max_new_tokens,
            "samples_per_prompt": samples_per_prompt,
            "seed": seed,
            "batch_size": batch_size,
        }
        self._vocabulary = vocabulary
        self.max_new_tokens = max_new_tokens
        self.rows_at_once = min(batch_size, len(rows) * samples_per_prompt)

    def __call__(self, model: TransformerDecoder) -> float:
        """The share of right answers, between 0 and 1."""
        engine = NativeEngine(
            model,
            stop_tokens=self._tokenizer.stop_tokens,
            pad_id=self._tokenizer.pad_id,
            vocabulary=self._vocabulary,
            **self._sampling,
        )
        rollout = engine.generate(self._prompts)
        responses = decode_responses(rollout.tokens_BS, rollout.response_mask_BS, self._tokenizer)
        n = self._sampling["samples_per_prompt"]
        answers = [str(answer) for answer in self._prompts.answers for _ in range(n)]
        scored = [sum(map(self._grader, responses, answers)), len(answers)] if self._counts else [0, 0]
        right, count = self._ranks.total(scored)
        return right / count


class ReferencePerplexity:
    """exp of the mean −log p, in nats, that a model gives the tokens of held-out reference answers, EOS included.

    Args:
        dataset: held-out prompts with reference answers; None is explained.
        tokenizer: pads.
        first: use only that many rows, from the start.
        max_answer_tokens: longer answers are cut there.
        tokens_per_micro_batch: prompts, answers and padding together.
        vocabulary: normalise over the first so many tokens, as in training; None takes all.
        ranks: the processes that share the work; each must call.
    """

    def __init__(
        self,
        dataset: PromptDataset | None,
        tokenizer: HuggingFaceTokenizer,
        *,
        first: int | None = None,
        max_answer_tokens: int = 512,
        tokens_per_micro_batch: int = 8192,
        vocabulary: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        dataset = _need_answers(dataset, "reference_perplexity")
        for name, value in (("first", first), ("max_answer_tokens", max_answer_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"reference_perplexity.{name} is {value}; it must be at least 1")
        count = len(dataset) if first is None else min(first, len(dataset))
        pairs = [(dataset[i][0], dataset.answer_tokens(i)[:max_answer_tokens]) for i in range(count)]
        self._pairs = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
        self._pad_id = tokenizer.pad_id
        self._tokens_per_micro_batch = tokens_per_micro_batch
        self._vocabulary = vocabulary
        self._ranks = ranks or Ranks()

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(len(prompt) + len(answer) for prompt, answer in self._pairs)

    def __call__(self, model: TransformerDecoder) -> float:
        """The perplexity; infinite where it exceeds what a float holds."""
        device = device_of(model)
        total, count = 0.0, 0.0
        rows = self._pairs[self._ranks.rank :: self._ranks.world_size]
        with gathered(model):
            while rows:
                size = max(1, self._tokens_per_micro_batch // (len(rows[-1][0]) + len(rows[-1][1])))
                batch, rows = rows[-size:], rows[:-size]
                tokens_BS, mask_BS = (tensor.to(device) for tensor in _pad_pairs(batch, self._pad_id))
                logprob_T = token_logprobs(model, tokens_BS, mask_BS, vocabulary=self._vocabulary)
                total, count = total - logprob_T.double().sum().item(), count + logprob_T.numel()
        total, count = self._ranks.total([total, count])
        return math.exp(total / count) if total / count < 700 else math.inf


def decode_responses(tokens_BS: Tensor, response_mask_BS: Tensor, tokenizer: HuggingFaceTokenizer) -> list[str]:
    """Texts of the marked tokens, without the stop token."""
    rows = zip(tokens_BS.tolist(), response_mask_BS.tolist(), strict=True)
    stops: Collection[int] = set(tokenizer.stop_tokens)
    kept = [[t for t, marked in zip(tokens, mask, strict=True) if marked and t not in stops] for tokens, mask in rows]
    return [tokenizer.decode(tokens) for tokens in kept]


def samples_as_markdown(rollout: Rollout, tokenizer: HuggingFaceTokenizer, count: int = 4) -> str:
    """The first prompts and responses of a rollout, for reading."""
    shown = rollout.rows(torch.arange(min(count, len(rollout)), device=rollout.tokens_BS.device))
    columns_S = torch.arange(shown.tokens_BS.shape[1], device=shown.tokens_BS.device)
    prompt_mask_BS = (columns_S < shown.lengths_B[:, None]) & ~shown.response_mask_BS
    prompts = decode_responses(shown.tokens_BS, prompt_mask_BS, tokenizer)
    responses = decode_responses(shown.tokens_BS, shown.response_mask_BS, tokenizer)
    texts = zip(prompts, responses, strict=True)
    return "\n\n---\n\n".join(f"**prompt**\n\n```\n{p}\n```\n\n**response**\n\n```\n{r}\n```" for p, r in texts)


def _need_answers(dataset: PromptDataset | None, component: str) -> PromptDataset:
    if dataset is None:
        raise ConfigError(f"{component} needs an eval_dataset, with held-out prompts")
    if not dataset.has_answers:
        raise ConfigError(f"{component} needs reference answers; give eval_dataset.answer_column")
    return dataset


def _pad_pairs(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    tokens_BS = torch.full((len(pairs), width), pad_id)
    mask_BS = torch.zeros(len(pairs), width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        tokens_BS[row, :end] = torch.tensor([*prompt, *answer])
        mask_BS[row, len(prompt) : end] = True
    return tokens_BS, mask_BS
