"""Which hidden states enter the loss: response tokens by position, states by anchor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from oprd_tune.config.checks import check_whole
from oprd_tune.errors import ConfigError
from oprd_tune.types import ResponseTokens, Rollout, Selection

# Token rank within its response (from 1), response length, k -> is the token selected?
POSITIONS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "all": lambda rank, length, k: rank >= 1,
    "last": lambda rank, length, k: rank == length,
    "first_k": lambda rank, length, k: rank <= k,
    "last_k": lambda rank, length, k: rank > length - k,
}
# How far left of its token the compared state stands.
ANCHORS = {"predict": 1, "consume": 0}


@dataclass(frozen=True)
class StateSelector:
    """Selects states as a config says: call it with a microbatch.

    Attributes:
        positions: which response tokens: `all`, `last`, `first_k` or `last_k`, counted per response.
        k: tokens per response for `first_k` and `last_k`; a shorter response is taken whole.
        anchor: which state stands for a token: `predict`, the one that it was predicted from, or `consume`, its own.

    Raises:
        ConfigError: for an unknown name or a k below 1.
    """

    positions: str = "all"
    k: int = 2000
    anchor: str = "predict"

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            allowed = ", ".join(POSITIONS)
            raise ConfigError(f"positions is {self.positions!r}; allowed are {allowed} (k is `positions_k`)")
        check_whole("positions_k", self.k)
        if self.anchor not in ANCHORS:
            raise ConfigError(f"anchor is {self.anchor!r}; allowed are {', '.join(ANCHORS)}")

    def __call__(self, rollout: Rollout) -> Selection:
        """The selected states, without those that a teacher with another tokenizer has no equal of."""
        selection = select_states(rollout.response_mask_BS, positions=self.positions, k=self.k, anchor=self.anchor)
        if (reading := rollout.reading) is None:
            return selection
        row_T = selection.index_T // rollout.tokens_BS.shape[1]
        column_T = reading.column_BS.flatten()[selection.index_T]
        met_T = column_T >= 0
        return Selection(
            index_T=selection.index_T[met_T],
            quarter_T=selection.quarter_T[met_T],
            teacher_index_T=(row_T * reading.tokens_BU.shape[1] + column_T)[met_T],
        )

    def most(self, response_length: int) -> int:
        """The most states that a response of some length can have selected."""
        return min(response_length, {"last": 1, "all": response_length}.get(self.positions, self.k))


def select_states(
    response_mask_BS: Tensor, *, positions: str = "all", k: int = 2000, anchor: str = "predict"
) -> Selection:
    """Select response tokens by position and return where their states stand.

    Positions choose *tokens*; the anchor then shifts the index and never changes the count. Under `predict` a token's
    state is the one it was predicted from, one column to the left (OPRD §6); under `consume` it is its own.

    Args:
        response_mask_BS: True on response tokens, contiguous in each row.
        positions: see `StateSelector`, as for the others.
        k: with `first_k` and `last_k`.
        anchor: one of `ANCHORS`.

    Returns:
        The selection, in row-major order; empty if no row has a response.

    Raises:
        ValueError: if, under `predict`, a response starts in column 0, where nothing predicts it.
    """
    if anchor == "predict" and bool(response_mask_BS[:, 0].any()):
        raise ValueError("a response starts in column 0, so no state predicts it; rows need a prompt")
    rank_BS = response_mask_BS.cumsum(1)
    length_B1 = rank_BS[:, -1:]
    chosen_BS = response_mask_BS & POSITIONS[positions](rank_BS, length_B1, k)
    quarter_BS = (rank_BS - 1) * 4 // length_B1.clamp(min=1)
    token_index_T = chosen_BS.flatten().nonzero(as_tuple=True)[0]
    index_T = token_index_T - ANCHORS[anchor]
    return Selection(index_T, quarter_T=quarter_BS.flatten()[token_index_T], teacher_index_T=index_T)


def response_tokens(rollout: Rollout) -> ResponseTokens:
    """All response tokens of a rollout, with the positions of the states that predict them."""
    at_T = rollout.response_mask_BS.flatten().nonzero(as_tuple=True)[0]
    top_ids_BSK, top_mass_BS = rollout.sampler_top_ids_BSK, rollout.sampler_top_mass_BS
    return ResponseTokens(
        index_T=select_states(rollout.response_mask_BS).index_T,
        tokens_T=rollout.tokens_BS.flatten()[at_T],
        sampler_logprobs_T=rollout.sampler_logprobs_BS.flatten()[at_T],
        sampler_top_ids_TK=None if top_ids_BSK is None else top_ids_BSK.flatten(0, 1)[at_T],
        sampler_top_mass_T=None if top_mass_BS is None else top_mass_BS.flatten()[at_T],
    )
