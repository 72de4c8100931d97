"""Batched sampling from a decoder with a key-value cache. How prompts are batched does not change the noise."""

from __future__ import annotations

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from oprd_tune.modeling.adapters import merged_while_gathered
from oprd_tune.modeling.output import device_of, evaluating
from oprd_tune.modeling.sharding import gathered
from oprd_tune.protocols import DecodesItself
from oprd_tune.rollout.native.decoding import incremental_decoding
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
    """

    def __init__(
        self,
        model: TransformerDecoder,
        request: SamplingRequest,
        *,
        temperature: float = 1.0,
        batch_size: int | None = None,
    ) -> None:
        self._model, self._request = model, request
        self._temperature = temperature if request.temperature is None else request.temperature
        self._batch_size = batch_size
        self._device = device_of(model)
        self._stop_tokens = torch.tensor(sorted(request.stop_tokens), device=self._device)

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
            stop_tokens=self._stop_tokens.tolist(),
            pad_id=self._request.pad_id,
            policy_version=policy_version,
            device=self._device,
        )

    def _decode(self, prompts: list[tuple[int, ...]], noise_BT: Tensor) -> list[Response]:
        """Sample one response to each prompt, in the order of `prompts`."""
        tokens_BP, visible_BP = self._left_pad(prompts)
        batch, length, top_k = len(prompts), self._request.max_new_tokens, self._request.top_k_ids
        response_BT = torch.full((batch, length), self._request.pad_id, device=self._device)
        logprob_BT = torch.zeros(batch, length, device=self._device)
        top_ids_BTK = torch.zeros(batch, length, top_k, dtype=torch.long, device=self._device)
        top_mass_BT = torch.zeros_like(logprob_BT)
        length_B = torch.zeros(batch, dtype=torch.long, device=self._device)
        row_B = torch.arange(batch, device=self._device)  # places in the batch of the rows that still decode
        input_BS, position_BS = tokens_BP, (visible_BP.cumsum(1) - 1).clamp(min=0)
        with incremental_decoding(self._model, visible_BP, length) as cache:
            for step in range(length):
                columns = input_BS.shape[1]
                logits_B1V = self._model(input_BS, mask=cache.mask(columns), input_pos=position_BS)
                cache.advance(columns)
                logits_BV = logits_B1V[:, -1, : self._request.vocabulary].float()
                normaliser_B1 = logits_BV.logsumexp(-1, keepdim=True)
                token_B = self._choose(logits_BV, noise_BT[row_B, step])
                response_BT[row_B, step] = token_B
                logprob_BT[row_B, step] = (logits_BV.gather(1, token_B[:, None]) - normaliser_B1).squeeze(1)
                if top_k:
                    top_BK, top_ids_BTK[row_B, step] = logits_BV.topk(top_k)
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
        results = [result.cpu() for result in (response_BT, logprob_BT, top_ids_BTK, top_mass_BT)]
        return [Response(*(result[b, :n] for result in results)) for b, n in enumerate(length_B.tolist())]

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
