"""Replace a decoder's LM head for a while, and score tokens with the head in chunks.

torchtune 0.6.1 always runs `model.output` on the final hidden states. So everything here swaps that module within a
scope. The rest of the model, and any wrapper around it, runs unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from oprd_tune.torchtune_compat import set_output

Head = Callable[[Tensor], Tensor]
_ROWS_PER_CHUNK = 1024  # 1024 rows of logits over 151,936 tokens take 0.6 GiB in fp32


@contextmanager
def swapped_output(model: TransformerDecoder, make_output: Callable[[Head], nn.Module]) -> Iterator[None]:
    """Within the scope, `model.output` is `make_output(head)`. The head, tied or not, is restored even after an error.

    The decoder casts what the stand-in returns to fp32.

    Raises:
        RuntimeError: if the output is already swapped, or is split into chunks by `set_num_output_chunks`.
    """
    head = model.output
    if isinstance(head, OutputStandIn):
        raise RuntimeError(f"the model's output is already replaced by {type(head).__name__}; scopes do not nest")
    if model.num_output_chunks:
        raise RuntimeError("set_num_output_chunks is for losses on logits; leave it at 0 for this model")
    stand_in = make_output(head)
    set_output(model, stand_in)
    try:
        yield
    finally:
        set_output(model, head)


def device_of(model: nn.Module) -> torch.device:
    """The device on which a model computes. Its buffers are there even if its parameters are offloaded to the CPU."""
    return next(chain(model.buffers(), model.parameters())).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the scope, the model is in evaluation mode, without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class OutputStandIn(nn.Module):
    """Base of the modules that replace the head for a while."""


class LastPositionHead(OutputStandIn):
    """Applies the head to the last column only; logits [B, 1, V]."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.__dict__["_head"] = head  # past nn.Module, which would make the model's head a submodule here too

    def forward(self, state_BSD: Tensor) -> Tensor:
        return self.__dict__["_head"](state_BSD[:, -1:])


class _TokenScorer(OutputStandIn):
    """Log-probabilities of the given next tokens at the given positions, [T], computed in chunks of rows."""

    def __init__(self, head: Head, index_T: Tensor, next_tokens_T: Tensor, vocabulary: int | None) -> None:
        super().__init__()
        self.__dict__["_head"] = head
        self._vocabulary = vocabulary
        self._index_T, self._next_tokens_T = index_T, next_tokens_T

    def forward(self, state_BSD: Tensor) -> Tensor:
        state_TD = state_BSD.flatten(0, 1)[self._index_T]
        chunks = zip(state_TD.split(_ROWS_PER_CHUNK), self._next_tokens_T.split(_ROWS_PER_CHUNK), strict=True)
        scores = [-nn.functional.cross_entropy(self._logits(s), t, reduction="none") for s, t in chunks]
        return torch.cat(scores) if scores else state_TD.new_zeros(0)

    def _logits(self, state_TD: Tensor) -> Tensor:
        return self.__dict__["_head"](state_TD.unsqueeze(0)).squeeze(0)[:, : self._vocabulary].float()


@torch.no_grad()
def token_logprobs(
    model: TransformerDecoder, tokens_BS: Tensor, response_mask_BS: Tensor, *, vocabulary: int | None = None
) -> Tensor:
    """Log-probabilities in nats, [T] in fp32, that `model` gives the marked tokens of right-padded rows.

    The result is in row-major order of the mask. No [T, V] tensor is formed.

    Args:
        response_mask_BS: True on the tokens to score; False in column 0.
        vocabulary: normalise over the ids below this number; None takes all.
    """
    index_T = response_mask_BS.flatten().nonzero(as_tuple=True)[0]
    next_tokens_T = tokens_BS.flatten()[index_T]
    scorer = swapped_output(model, lambda head: _TokenScorer(head, index_T - 1, next_tokens_T, vocabulary))
    with evaluating(model), scorer:
        return model(tokens_BS)
