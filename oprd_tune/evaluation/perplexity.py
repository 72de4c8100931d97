"""The perplexity of held-out reference answers."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchtune.modules import TransformerDecoder

from oprd_tune.config.checks import check_whole
from oprd_tune.evaluation.texts import need_answers
from oprd_tune.modeling.output import device_of, token_logprobs
from oprd_tune.modeling.sharding import gathered
from oprd_tune.protocols import PromptSource, Tokenizer
from oprd_tune.ranks import Ranks


class ReferencePerplexity:
    """exp(mean of −log p), in nats, over the tokens of held-out reference answers, EOS included.

    Args:
        dataset: held-out prompts with reference answers. None raises a ConfigError that says what is missing.
        tokenizer: gives the padding token.
        first: use only the first so many prompts; None uses all.
        max_answer_tokens: longer answers are cut at that length.
        tokens_per_micro_batch: tokens of prompts, answers and padding together.
        vocabulary: normalise over the first so many token ids, as in training; None takes all.
        ranks: the processes that share the work.
    """

    def __init__(
        self,
        dataset: PromptSource | None,
        tokenizer: Tokenizer,
        *,
        first: int | None = None,
        max_answer_tokens: int = 512,
        tokens_per_micro_batch: int = 8192,
        vocabulary: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        dataset = need_answers(dataset, "reference_perplexity")
        if first is not None:
            check_whole("reference_perplexity.first", first)
        check_whole("reference_perplexity.max_answer_tokens", max_answer_tokens)
        check_whole("reference_perplexity.tokens_per_micro_batch", tokens_per_micro_batch)
        count = len(dataset) if first is None else min(first, len(dataset))
        pairs = [(dataset[i][0], dataset.answer_tokens(i)[:max_answer_tokens]) for i in range(count)]
        self._pairs = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
        self._pad_id, self._vocabulary = tokenizer.pad_id, vocabulary
        self._tokens_per_micro_batch = tokens_per_micro_batch
        self._ranks = ranks or Ranks()

    @property
    def longest(self) -> int:
        """The number of tokens in the longest prompt with its answer."""
        return max(len(prompt) + len(answer) for prompt, answer in self._pairs)

    def __call__(self, model: TransformerDecoder) -> float:
        """The perplexity of a model; infinite if it exceeds what a float holds. Every rank must call."""
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


def _pad_pairs(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids of prompts with their answers, right-padded, and a mask of the answers."""
    tokens = [torch.tensor([*prompt, *answer]) for prompt, answer in pairs]
    masks = [torch.tensor([False] * len(prompt) + [True] * len(answer)) for prompt, answer in pairs]
    return pad_sequence(tokens, batch_first=True, padding_value=pad_id), pad_sequence(masks, batch_first=True)
