"""How rows of different lengths share a forward pass: laid end to end, or padded where a model needs that."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

# Starting a microbatch takes a GPU about as long as that many tokens: the part of an update's time that does not grow
# with its tokens, as benchmarks/update_cost.py measures it at 4,096 and at 16,384.
STARTING = 1024


@dataclass(frozen=True, eq=False)
class Packed:
    """Right-padded rows laid end to end, without their padding.

    A model reads the N tokens as N rows of one column. As the `mask` of a forward pass, this object keeps attention
    within the real rows; see `modeling/row_attention.py`.

    Attributes:
        lengths: number of tokens in each row, known to the host.
        starts_B: int32, where each row starts, and N at the end: one number more than there are rows.
        grid_N: each token's position in the flattened grid [B * S] of padded rows.
        width: S, the number of columns of that grid.
    """

    lengths: tuple[int, ...]
    starts_B: Tensor
    grid_N: Tensor
    width: int

    @staticmethod
    def of(lengths_B: Tensor, width: int) -> Packed | None:
        """Lay rows of these lengths, padded to `width`, end to end; None if they have no padding. The host waits."""
        lengths = tuple(lengths_B.tolist())
        if all(length == width for length in lengths):
            return None
        real_BS = torch.arange(width, device=lengths_B.device) < lengths_B.unsqueeze(1)
        starts_B = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=lengths_B.device)
        return Packed(lengths, starts_B, real_BS.flatten().nonzero().squeeze(1), width)

    def at(self, index_T: Tensor) -> Tensor:
        """Positions in the flattened grid [B * S] as positions among the N tokens."""
        return self.starts_B[index_T // self.width] + index_T % self.width

    def read_by(self, model: Any, tokens_BS: Tensor) -> Tensor:
        """What `model` makes of the rows `tokens_BS`. Its states are [N, 1, D]."""
        tokens_N1 = tokens_BS.flatten()[self.grid_N].unsqueeze(1)
        result: Tensor = model(tokens_N1, mask=self, input_pos=(self.grid_N % self.width).unsqueeze(1))
        return result


def filled(lengths: list[int], budget: int) -> list[list[int]]:
    """Which rows share a microbatch of at most `budget` tokens without padding: each is put where it first fits.

    The lengths descend, which keeps the number of microbatches within 11/9 of the least possible, plus one.
    """
    found: list[list[int]] = []
    room: list[int] = []
    for row, length in enumerate(lengths):
        place = next((i for i, left in enumerate(room) if length <= left), len(found))
        if place == len(found):
            found.append([])
            room.append(budget)
        found[place].append(row)
        room[place] -= length
    return found


def cut(lengths: list[int], budget: int, *, one_if_it_fits: bool) -> list[list[int]]:
    """Which padded rows, whose lengths descend, share a microbatch of at most `budget` tokens, padding included.

    Rows of similar length do. Of all such cuts it is the one of least cost, if a microbatch costs the tokens that it
    computes and `STARTING` more.
    """
    rows = list(range(len(lengths)))
    if one_if_it_fits and lengths and len(lengths) * lengths[0] <= budget:
        return [rows]
    cost, size = torch.zeros(len(lengths) + 1, dtype=torch.float64), [0] * len(lengths)
    for i in reversed(rows):
        most = min(len(lengths) - i, max(1, budget // lengths[i]))
        costs = lengths[i] * torch.arange(1, most + 1) + STARTING + cost[i + 1 : i + 1 + most]
        size[i] = most - int(costs.flip(0).argmin())  # of equal costs, the fewest microbatches
        cost[i] = costs[size[i] - 1]
    found = []
    while rows:
        found.append(rows[: size[rows[0]]])
        rows = rows[size[rows[0]] :]
    return found
