"""Standing in for a decoder's LM head, and scoring tokens with it in chunks.

torchtune 0.6.1 always runs `model.output` on the final hidden states. Everything here works by swapping that module
inside a scope: the rest of the model, and whatever wraps it, runs unchanged.
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
# Rows scored at once: 1024 rows of logits over 151,936 tokens take 0.6 GiB in fp32.
_ROWS_PER_CHUNK = 1024


@contextmanager
def swapped_output(model: TransformerDecoder, make_output: Callable[[Head], nn.Module]) -> Iterator[None]:
    """Within the scope, `model.output` is `make_output(head)`; afterwards the head is back, whatever happened.

    Args:
        model: a torchtune decoder with a tied or an untied head.
        make_output: builds the stand-in from the original head. Its return value is cast to fp32 by the decoder.

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
    """Where a model computes: its buffers are there, also when its parameters wait in CPU memory."""
    return next(chain(model.buffers(), model.parameters())).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the scope, the model is in evaluation mode: no dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class OutputStandIn(nn.Module):
    """Base of everything that takes the head's place for a while."""


class LastPositionHead(OutputStandIn):
    """Apply the head to the last column only: logits [B, 1, V]."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.__dict__["_head"] = head  # not a submodule: the head stays the property of the model

    def forward(self, state_BSD: Tensor) -> Tensor:
        return self.__dict__["_head"](state_BSD[:, -1:])


class _TokenScorer(OutputStandIn):
    """Log-probabilities of given next tokens at given positions, [T], a chunk of rows at a time."""

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
    """Log-probabilities in nats that `model` gives the marked tokens of right-padded rows.

    Args:
        model: a decoder with its head.
        tokens_BS: token ids.
        response_mask_BS: True on the tokens to score; never in column 0.
        vocabulary: normalise over the first so many tokens; None takes all.

    Returns:
        fp32, shape [T], in row-major order of the mask. Nothing of size [T, V] is ever alive.
    """
    index_T = response_mask_BS.flatten().nonzero(as_tuple=True)[0]
    next_tokens_T = tokens_BS.flatten()[index_T]
    scorer = swapped_output(model, lambda head: _TokenScorer(head, index_T - 1, next_tokens_T, vocabulary))
    with evaluating(model), scorer:
        return model(tokens_BS)
