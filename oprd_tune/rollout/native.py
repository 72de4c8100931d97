"""Sampling with the trainer's own model: no second copy of the weights, nothing to synchronise."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from oprd_tune.modeling.adapters import merged_while_gathered
from oprd_tune.modeling.head import device_of, evaluating
from oprd_tune.modeling.sharding import gathered
from oprd_tune.rollout.decoding import DecodingCache, incremental_decoding
from oprd_tune.rollout.noise import inverse_cdf, sample_noise
from oprd_tune.rollout.responses import Response, pack_responses
from oprd_tune.rollout.sampling import check_sampling
from oprd_tune.types import Prompts, Rollout


class NativeEngine:
    """Batched sampling with a key-value cache. Its noise does not depend on how prompts are batched.

    Args:
        model: the student itself, in any wrapping the taps work with. A sharded one is gathered while it samples, so
            all ranks must call `generate` together, each with prompts of its own.
        stop_tokens: ids that end a response; the one sampled belongs to it.
        pad_id: fills rows up to the longest.
        max_new_tokens: a response that reaches it is cut and marked `truncated`.
        samples_per_prompt: responses to each prompt.
        temperature: 1 is on-policy; 0 is greedy. Log-probabilities are always those at temperature 1.
        seed: with the stream and the global sample index, determines the noise.
        batch_size: most rows decoded at once; bounds the cache's memory. None takes all.
        vocabulary: sample from the first so many tokens only: those that the teacher has too. None takes all.
        top_k_ids: return that many of the most probable tokens with each sampled one. None returns none.

    Raises:
        ConfigError: for a negative temperature or a size below 1.
    """

    samples_with_student: ClassVar[bool] = True

    def __init__(
        self,
        model: TransformerDecoder,
        *,
        stop_tokens: Collection[int],
        pad_id: int,
        max_new_tokens: int,
        samples_per_prompt: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int | None = None,
        vocabulary: int | None = None,
        top_k_ids: int | None = None,
    ) -> None:
        sizes = {"max_new_tokens": max_new_tokens, "samples_per_prompt": samples_per_prompt, "batch_size": batch_size}
        check_sampling(temperature, **sizes, vocabulary=vocabulary, top_k_ids=top_k_ids)
        self._model = model
        self._device = device_of(model)
        self._stop_tokens = torch.tensor(sorted(stop_tokens), device=self._device)
        self._pad_id = pad_id
        self._max_new_tokens = max_new_tokens
        self._samples_per_prompt = samples_per_prompt
        self._temperature = temperature
        self._seed = seed
        self._batch_size = batch_size
        self._vocabulary = vocabulary
        self._top_k_ids = top_k_ids or 0
        self._policy_version = 0

    @staticmethod
    def memory_bytes(
        model: TransformerDecoder, *, rows: int, columns: int, dtype: torch.dtype, batch_size: int | None = None
    ) -> tuple[int, int]:
        """Memory that is held all the time, none, and that sampling takes at most: keys, values, and a row of logits.

        Args:
            model: possibly on the meta device.
            rows: of the largest rollout.
            columns: tokens of the longest row, prompt included.
            dtype: of keys and values.
            batch_size: see the class.
        """
        rows = min(rows, batch_size or rows)
        attention = model.layers[0].attn
        column = 2 * attention.num_kv_heads * attention.head_dim * dtype.itemsize
        logits = 4 * model.tok_embeddings.num_embeddings * 4  # as they come, in fp32, as weights, and padded
        # A cache that grows holds a fourth too much, and a copy of one layer.
        return 0, int(rows * (1.25 * column * columns * (len(model.layers) + 1) + logits))

    def sync_weights(self, policy_version: int) -> None:
        """The weights are shared; only the version is noted."""
        self._policy_version = policy_version

    def close(self) -> None:
        """Nothing is held between rollouts."""

    @torch.no_grad()
    def generate(self, prompts: Prompts, *, stream: int = 0) -> Rollout:
        """Sample responses, rows of one prompt side by side. See `RolloutEngine.generate`."""
        n = self._samples_per_prompt
        rows = [tokens for tokens in prompts.tokens for _ in range(n)]
        samples = [position * n + i for position in prompts.positions for i in range(n)]
        noise_BT = sample_noise(self._seed, stream, samples, self._max_new_tokens).to(self._device)
        # Rows of similar prompt length decode together; the order is undone below.
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        size = self._batch_size or len(rows)
        responses: dict[int, Response] = {}
        with evaluating(self._model), gathered(self._model), merged_while_gathered(self._model):
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                decoded = self._decode([rows[row] for row in batch], noise_BT[batch])
                responses |= dict(zip(batch, decoded, strict=True))
        return pack_responses(
            prompts,
            [responses[row] for row in range(len(rows))],
            samples_per_prompt=n,
            stop_tokens=self._stop_tokens.tolist(),
            pad_id=self._pad_id,
            policy_version=self._policy_version,
            device=self._device,
        )

    def _decode(self, prompts: list[tuple[int, ...]], noise_BT: Tensor) -> list[Response]:
        """Responses in the order of `prompts`."""
        tokens_BP, visible_BP = self._left_pad(prompts)
        batch = len(prompts)
        response_BT = torch.full((batch, self._max_new_tokens), self._pad_id, device=self._device)
        logprob_BT = torch.zeros(batch, self._max_new_tokens, device=self._device)
        top_ids_BTK = torch.zeros(batch, self._max_new_tokens, self._top_k_ids, dtype=torch.long, device=self._device)
        top_mass_BT = torch.zeros_like(logprob_BT)
        length_B = torch.zeros(batch, dtype=torch.long, device=self._device)
        row_B = torch.arange(batch, device=self._device)  # the rows still decoding, by their place in the batch
        input_BS, position_BS = tokens_BP, (visible_BP.cumsum(1) - 1).clamp(min=0)
        with incremental_decoding(self._model, visible_BP, self._max_new_tokens) as cache:
            for step in range(self._max_new_tokens):
                logits_BV = self._forward(cache, input_BS, position_BS)[:, : self._vocabulary].float()
                normaliser_B1 = logits_BV.logsumexp(-1, keepdim=True)
                token_B = self._choose(logits_BV, noise_BT[row_B, step])
                response_BT[row_B, step] = token_B
                logprob_BT[row_B, step] = (logits_BV.gather(1, token_B[:, None]) - normaliser_B1).squeeze(1)
                if self._top_k_ids:
                    top_BK, top_ids_BTK[row_B, step] = logits_BV.topk(self._top_k_ids)
                    top_mass_BT[row_B, step] = (top_BK - normaliser_B1).exp().sum(-1)
                length_B[row_B] += 1
                going_B = torch.isin(token_B, self._stop_tokens, invert=True).nonzero(as_tuple=True)[0]
                if not len(going_B):
                    break
                input_BS, position_BS = token_B[:, None], position_BS[:, -1:] + 1
                if len(going_B) < len(row_B):
                    cache.keep_rows(going_B)
                    row_B, input_BS, position_BS = row_B[going_B], input_BS[going_B], position_BS[going_B]
        if not bool(logprob_BT.isfinite().all()):
            raise FloatingPointError(
                "the student's logits are not finite, so nothing can be sampled from it; lower the learning rate, or "
                "set dtype=fp32 to see whether precision is the cause"
            )
        columns = [column.cpu() for column in (response_BT, logprob_BT, top_ids_BTK, top_mass_BT)]
        return [Response(*(column[b, :n] for column in columns)) for b, n in enumerate(length_B.tolist())]

    def _forward(self, cache: DecodingCache, input_BS: Tensor, position_BS: Tensor) -> Tensor:
        columns = input_BS.shape[1]
        logits_B1V = self._model(input_BS, mask=cache.mask(columns), input_pos=position_BS)
        cache.advance(columns)
        return logits_B1V[:, -1]

    def _choose(self, logits_BV: Tensor, noise_B: Tensor) -> Tensor:
        """Sample, or take the argmax at temperature 0."""
        if self._temperature == 0:
            return logits_BV.argmax(-1)
        scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).div_(self._temperature)
        return inverse_cdf(scaled_BV.exp_(), noise_B[:, None]).squeeze(1)

    def _left_pad(self, prompts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        tokens = [[self._pad_id] * (width - len(p)) + list(p) for p in prompts]
        visible = [[False] * (width - len(p)) + [True] * len(p) for p in prompts]
        return torch.tensor(tokens, device=self._device), torch.tensor(visible, device=self._device)
