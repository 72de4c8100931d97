"""Which hidden states enter the loss: response tokens chosen by position, and the state that stands for each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from oprd_tune.config.checks import check_whole
from oprd_tune.errors import ConfigError
from oprd_tune.selection import ResponseTokens, Selection
from oprd_tune.types import Rollout

# From a token's rank in its response (counted from 1), the response's length and k: is the token selected?
POSITIONS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "all": lambda rank, length, k: rank >= 1,
    "last": lambda rank, length, k: rank == length,
    "first_k": lambda rank, length, k: rank <= k,
    "last_k": lambda rank, length, k: rank > length - k,
}
PARTS = 16  # of a response, for metrics by position
# How many columns left of its token the compared state is.
ANCHORS = {"predict": 1, "consume": 0}


@dataclass(frozen=True)
class StateSelector:
    """Selects the states of a microbatch as a config says.

    Attributes:
        positions: which tokens of each response are selected: `all`, `last`, `first_k` or `last_k`.
        k: number of tokens per response for `first_k` and `last_k`. A shorter response is selected whole.
        anchor: which state stands for a token: `predict`, the state that predicts it, one column to its left (OPRD §6),
            or `consume`, the token's own. The anchor never changes the number of selected states.
        average_over: `tokens`, so that all selected tokens of a step weigh the same, or `responses`, as Eq. 6 is
            written: the mean over the responses of the mean over the selected tokens of each.

    Raises:
        ConfigError: for an unknown name or a k below 1.
    """

    positions: str = "all"
    k: int = 2000
    anchor: str = "predict"
    average_over: str = "tokens"

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            allowed = ", ".join(POSITIONS)
            raise ConfigError(f"positions is {self.positions!r}; allowed are {allowed} (k is `positions_k`)")
        check_whole("positions_k", self.k)
        if self.anchor not in ANCHORS:
            raise ConfigError(f"anchor is {self.anchor!r}; allowed are {', '.join(ANCHORS)}")
        if self.average_over not in ("tokens", "responses"):
            raise ConfigError(f"average_over is {self.average_over!r}; allowed are tokens, responses")

    def __call__(self, rollout: Rollout) -> Selection:
        """The selected states. If the teacher has another tokenizer, only states that match one of its own."""
        selection = select_states(rollout.response_mask_BS, positions=self.positions, k=self.k, anchor=self.anchor)
        if rollout.reading is not None:
            teacher_index_T = teacher_positions(rollout, selection.index_T)
            met_T = teacher_index_T >= 0
            selection = Selection(selection.index_T[met_T], selection.part_T[met_T], teacher_index_T[met_T])
        selection = replace(selection, index_T=rollout.states_at(selection.index_T))
        return replace(selection, weight_T=self._weights(selection.index_T, rollout))

    def tokens(self, rollout: Rollout) -> ResponseTokens:
        """All response tokens of a rollout, with the weights of its responses."""
        tokens = response_tokens(rollout)
        return replace(tokens, weight_T=self._weights(tokens.index_T, rollout))

    def _weights(self, index_T: Tensor, rollout: Rollout) -> Tensor | None:
        """1 / (the number of selected tokens in its response) for each token; None where all tokens weigh the same."""
        if self.average_over == "tokens":
            return None
        row_T = rollout.in_grid(index_T) // rollout.tokens_BS.shape[1]
        return 1 / row_T.bincount(minlength=len(rollout))[row_T].float()

    def most(self, response_length: int) -> int:
        """The largest number of states that can be selected in a response of this length."""
        return min(response_length, {"last": 1, "all": response_length}.get(self.positions, self.k))


def teacher_positions(rollout: Rollout, index_T: Tensor) -> Tensor:
    """The teacher's matching positions in its own [B * U] grid; -1 where no state of its own matches."""
    reading = rollout.reading
    if reading is None:
        return index_T
    row_T, column_T = index_T // rollout.tokens_BS.shape[1], reading.column_BS.flatten()[index_T]
    return (row_T * reading.tokens_BU.shape[1] + column_T).where(column_T >= 0, -1)


def select_states(
    response_mask_BS: Tensor, *, positions: str = "all", k: int = 2000, anchor: str = "predict"
) -> Selection:
    """Select response tokens by position and return the positions of their states, in row-major order.

    The response tokens of each row must be contiguous. The other arguments are those of `StateSelector`.

    Raises:
        ValueError: if, under `predict`, a response starts in column 0, where no state predicts it.
    """
    if anchor == "predict" and bool(response_mask_BS[:, 0].any()):
        raise ValueError("a response starts in column 0, so no state predicts it; rows need a prompt")
    rank_BS = response_mask_BS.cumsum(1)
    length_B1 = rank_BS[:, -1:]
    chosen_BS = response_mask_BS & POSITIONS[positions](rank_BS, length_B1, k)
    part_BS = (rank_BS - 1) * PARTS // length_B1.clamp(min=1)
    token_index_T = chosen_BS.flatten().nonzero(as_tuple=True)[0]
    index_T = token_index_T - ANCHORS[anchor]
    return Selection(index_T, part_T=part_BS.flatten()[token_index_T], teacher_index_T=index_T)


def response_tokens(rollout: Rollout) -> ResponseTokens:
    """All response tokens of a rollout, with the positions of the states that predict them."""
    at_T = rollout.response_mask_BS.flatten().nonzero(as_tuple=True)[0]
    top_ids_BSK, top_mass_BS = rollout.sampler_top_ids_BSK, rollout.sampler_top_mass_BS
    index_T = select_states(rollout.response_mask_BS).index_T
    row_T = at_T // rollout.tokens_BS.shape[1]
    return ResponseTokens(
        index_T=rollout.states_at(index_T),
        tokens_T=rollout.tokens_BS.flatten()[at_T],
        sampler_logprobs_T=rollout.sampler_logprobs_BS.flatten()[at_T],
        sampler_top_ids_TK=None if top_ids_BSK is None else top_ids_BSK.flatten(0, 1)[at_T],
        sampler_top_mass_T=None if top_mass_BS is None else top_mass_BS.flatten()[at_T],
        teacher_index_T=teacher_positions(rollout, index_T),
        given_T=None if rollout.given_B is None else rollout.given_B[row_T],
        advantage_T=None if rollout.advantage_B is None else rollout.advantage_B[row_T],
    )
