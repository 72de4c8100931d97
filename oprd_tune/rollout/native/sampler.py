"""Batched sampling from a decoder with a key-value cache. How prompts are batched does not change the noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from oprd_tune.modeling.adapters import merged_while_gathered
from oprd_tune.modeling.output import device_of, evaluating
from oprd_tune.modeling.sharding import gathered
from oprd_tune.protocols import DecodesItself
from oprd_tune.rollout.native.caches import SteadyCache
from oprd_tune.rollout.native.decoding import incremental_decoding, unwrapped
from oprd_tune.rollout.native.pace import Pace, pace_for
from oprd_tune.rollout.native.rows import Rows
from oprd_tune.rollout.noise import inverse_cdf, sample_noise
from oprd_tune.rollout.responses import Response, pack_responses
from oprd_tune.types import Prompts, Rollout, SamplingRequest


def sampling_bytes(model: TransformerDecoder, *, rows: int, columns: int, dtype: torch.dtype) -> int:
    """Bytes that a `Sampler` takes at most: keys, values, and a row of logits for each response.

    Args:
        model: may be on the meta device.
        rows: the number of rows decoded at once.
        columns: tokens of the longest row, prompt included.
        dtype: the dtype of keys and values.
    """
    if isinstance(model, DecodesItself):
        column = model.cached_numbers * dtype.itemsize
    else:
        attention = model.layers[0].attn
        column = 2 * attention.num_kv_heads * attention.head_dim * dtype.itemsize
    logits = 4 * model.tok_embeddings.num_embeddings * 4  # four copies: the model's output, fp32, weights, padded
    # A growing cache may hold a quarter more than is filled, and a copy of one layer.
    return int(rows * (1.25 * column * columns * (len(model.layers) + 1) + logits))


class Sampler:
    """Samples from a decoder. The noise of a response depends on the seed, the stream and the response's place.

    Args:
        model: any decoder that the taps work with. A sharded model is gathered while it samples. So all ranks must call
            `sample` together, each with its own prompts.
        temperature: 0 is greedy; that of the request, if it has one, goes before it. Log-probabilities are always those
            at temperature 1.
        batch_size: the most rows decoded at once; None decodes all rows at once.
        pace: None takes the one that suits the model's device.
    """

    def __init__(
        self,
        model: TransformerDecoder,
        request: SamplingRequest,
        *,
        temperature: float = 1.0,
        batch_size: int | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._model, self._request = model, request
        self._temperature = temperature if request.temperature is None else request.temperature
        self._batch_size, self._pace = batch_size, pace
        self._device = device_of(model)

    @torch.no_grad()
    def sample(self, prompts: Prompts, *, stream: int = 0, policy_version: int = 0) -> Rollout:
        """Sample responses. Those to one prompt are in adjacent rows.

        Args:
            stream: distinguishes the noise of otherwise equal calls.
            policy_version: the version to note in the rollout.

        Raises:
            FloatingPointError: if a logit is not finite.
        """
        n = self._request.samples_per_prompt
        rows = [tokens for tokens in prompts.tokens for _ in range(n)]
        samples = [position * n + i for position in prompts.positions for i in range(n)]
        noise_BT = sample_noise(self._request.seed, stream, samples, self._request.max_new_tokens).to(self._device)
        # Rows with prompts of similar length decode together. The original order is restored below.
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
            stop_tokens=self._request.stop_tokens,
            pad_id=self._request.pad_id,
            policy_version=policy_version,
            device=self._device,
        )

    def _decode(self, prompts: list[tuple[int, ...]], noise_BT: Tensor) -> list[Response]:
        """Sample one response to each prompt, in the order of `prompts`."""
        tokens_BP, visible_BP = self._left_pad(prompts)
        pace = self._pace or pace_for(self._model, self._device)
        rows = Rows(visible_BP, self._request, noise_BT)
        new_tokens = self._request.max_new_tokens
        with incremental_decoding(self._model, visible_BP, new_tokens, steady=pace.steady) as cache:
            self._step(cache, rows, tokens_BP, (visible_BP.cumsum(1) - 1).clamp(min=0))
            cache.advance(tokens_BP.shape[1])
            with unwrapped(self._model):
                self._go_on(cache, rows, pace)
        return rows.responses()

    def _go_on(self, cache: Any, rows: Rows, pace: Pace) -> None:
        """Sample until all rows have ended, or are as long as was asked for."""

        def step() -> None:
            self._step(cache, rows, rows.token_B1, rows.position_B1)

        steady = cache if isinstance(cache, SteadyCache) else None  # a model may have a cache of its own
        run, has_moved = step, steady is not None
        for place in range(1, self._request.max_new_tokens):
            if place % pace.check_every == 0:
                going_B = rows.going_B.nonzero(as_tuple=True)[0]
                if not len(going_B):
                    return
                if len(going_B) < len(rows) and len(going_B) <= pace.rows_leave_at * len(rows):
                    cache.keep_rows(going_B)
                    rows.keep(going_B)
                    has_moved = True
            if steady is not None and (steady.make_room() or has_moved):
                run, has_moved = pace.repeatable(step), False
            rows.place_1.fill_(place)
            run()
            cache.advance(1)

    def _step(self, cache: Any, rows: Rows, input_BS: Tensor, position_BS: Tensor) -> None:
        """Read new columns of all rows, and sample the token after them."""
        logits_B1V = self._model(input_BS, mask=cache.mask(input_BS.shape[1]), input_pos=position_BS)
        logits_BV = logits_B1V[:, -1, : self._request.vocabulary].float()
        rows.add(self._choose(logits_BV, rows.noise_B), logits_BV)

    def _choose(self, logits_BV: Tensor, noise_B: Tensor) -> Tensor:
        """Sample, or take the argmax at temperature 0."""
        if self._temperature == 0:
            return logits_BV.argmax(-1)
        scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).div_(self._temperature)
        return inverse_cdf(scaled_BV.exp_(), noise_B[:, None]).squeeze(1)

    def _left_pad(self, prompts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        tokens = [[self._request.pad_id] * (width - len(p)) + list(p) for p in prompts]
        visible = [[False] * (width - len(p)) + [True] * len(p) for p in prompts]
        return torch.tensor(tokens, device=self._device), torch.tensor(visible, device=self._device)
