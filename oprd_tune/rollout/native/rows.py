"""What is sampled for the rows of a batch, in tensors that each decoding step reads and writes in place."""

from __future__ import annotations

import torch
from torch import Tensor

from oprd_tune.rollout.responses import Response
from oprd_tune.types import SamplingRequest


class Rows:
    """Samples so far. Nothing here waits for the device but `responses`, and a step reads no number of the host's.

    Args:
        visible_BP: True on the tokens of left-padded prompts, False on padding.
        noise_BT: uniform numbers in [0, 1), one for each token.

    Attributes:
        going_B: whether a row that still decodes goes on. Rows that have ended decode on until they are dropped, and
            what they sample then does not count.
        place_1: the place of the next token in its response.
        token_B1: the last token of each row that still decodes.
    """

    def __init__(self, visible_BP: Tensor, request: SamplingRequest, noise_BT: Tensor) -> None:
        device, shape = visible_BP.device, noise_BT.shape
        self._noise_BT, self._top_k = noise_BT, request.top_k_ids
        self._stop_N = torch.tensor(sorted(request.stop_tokens), dtype=torch.long, device=device)
        self._sampled_BT = torch.full(shape, request.pad_id, device=device)
        self._logprob_BT = torch.zeros(shape, device=device)
        self._top_ids_BTK = torch.zeros(*shape, request.top_k_ids, dtype=torch.long, device=device)
        self._top_mass_BT = torch.zeros_like(self._logprob_BT)
        self._row_B = torch.arange(len(visible_BP), device=device)  # places in the batch of the rows that still decode
        self._last_B1 = (visible_BP.sum(1, keepdim=True) - 1).clamp(min=0)  # positions of the prompts' last tokens
        self.going_B = torch.ones_like(self._row_B, dtype=torch.bool)
        self.token_B1 = torch.zeros_like(self._last_B1)
        self.place_1 = torch.zeros(1, dtype=torch.long, device=device)

    def __len__(self) -> int:
        return len(self._row_B)

    @property
    def position_B1(self) -> Tensor:
        """The position of `token_B1` in its row."""
        return self._last_B1 + self.place_1

    @property
    def noise_B(self) -> Tensor:
        """The noise of the next tokens."""
        return self._noise_BT[self._row_B, self.place_1]

    def add(self, token_B: Tensor, logits_BV: Tensor) -> None:
        """Append a token to each row that still decodes. Its log-probability follows from the logits."""
        at = self._row_B, self.place_1
        normaliser_B1 = logits_BV.logsumexp(-1, keepdim=True)
        self._sampled_BT[at] = token_B
        self._logprob_BT[at] = (logits_BV.gather(1, token_B[:, None]) - normaliser_B1).squeeze(1)
        if self._top_k:
            top_BK, self._top_ids_BTK[at] = logits_BV.topk(self._top_k)
            self._top_mass_BT[at] = (top_BK - normaliser_B1).exp().sum(-1)
        self.token_B1.copy_(token_B[:, None])
        self.going_B.logical_and_((self.token_B1 != self._stop_N).all(-1))

    def keep(self, index_B: Tensor) -> None:
        """Decode no other rows any more."""
        self._row_B, self._last_B1 = self._row_B[index_B], self._last_B1[index_B]
        self.going_B, self.token_B1 = self.going_B[index_B], self.token_B1[index_B]

    def responses(self) -> list[Response]:
        """All responses, each up to its first stop token; raises FloatingPointError if a logit was not finite."""
        length = self._sampled_BT.shape[1]
        stops_BT = torch.isin(self._sampled_BT, self._stop_N)
        length_B = torch.where(stops_BT.any(1), stops_BT.int().argmax(1) + 1, length)
        counts_BT = torch.arange(length, device=length_B.device) < length_B[:, None]
        if not bool((self._logprob_BT.isfinite() | ~counts_BT).all()):
            raise FloatingPointError(
                "the student's logits are not finite, so nothing can be sampled from it; lower the learning rate, or "
                "set dtype=fp32 to see whether precision is the cause"
            )
        results = (self._sampled_BT, self._logprob_BT, self._top_ids_BTK, self._top_mass_BT)
        on_host = [result.cpu() for result in results]
        return [Response(*(result[b, :n] for result in on_host)) for b, n in enumerate(length_B.tolist())]
