"""Key-value caches of a decoder: one whose views grow with each token, and one whose shapes stay for many tokens."""

from __future__ import annotations

import torch
from torch import Tensor

_MARGIN = 32  # spare columns when a cache grows
_STEADY_MARGIN, _STEADY_MULTIPLE = 96, 64


class DecodingCache:
    """The keys and values of all layers for B left-padded rows, and the columns that each row may see.

    Args:
        visible_BS: True on the tokens of the prompts, False on padding. The prompts fill the first columns.
        capacity: the maximum number of columns, prompts included. Memory is allocated as they fill.
    """

    def __init__(self, visible_BS: Tensor, capacity: int) -> None:
        batch, self._prompt_columns = visible_BS.shape
        self.columns = 0
        self.device = visible_BS.device
        self._capacity = capacity
        self._padded = not bool(visible_BS.all())
        self._visible_BS = torch.ones(batch, capacity, dtype=torch.bool, device=visible_BS.device)
        self._visible_BS[:, : self._prompt_columns] = visible_BS
        self._keys_values: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key_BHSD: Tensor, value_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write new columns of one layer. Returns views of all its columns so far."""
        end = self.columns + key_BHSD.shape[2]
        stores = self._keys_values.get(layer)
        if stores is None or stores[0].shape[2] < end:
            columns = self._room_for(end)
            old = stores or (key_BHSD[:, :, :0], value_BHSD[:, :, :0])
            self._keys_values[layer] = stores = (self._copy(old[0], columns), self._copy(old[1], columns))
        for store, new in zip(stores, (key_BHSD, value_BHSD), strict=True):
            store[:, :, self.columns : end] = new
        return stores[0][:, :, :end], stores[1][:, :, :end]

    def _room_for(self, columns: int) -> int:
        """How many columns to make room for, when so many are needed."""
        return min(self._capacity, max(columns + _MARGIN, columns * 5 // 4))

    def _copy(self, store: Tensor, columns: int, index_B: Tensor | None = None) -> Tensor:
        """Copy the filled columns of the given rows, or of all rows, to a new store with room for `columns`."""
        rows, heads, _, width = store.shape
        copy = store.new_empty(rows if index_B is None else len(index_B), heads, columns, width)
        filled = store[:, :, : self.columns]
        copy[:, :, : filled.shape[2]] = filled if index_B is None else filled[index_B]
        return copy

    def advance(self, length: int) -> None:
        """Count `length` columns as filled, after a forward pass has written them in all layers."""
        self.columns += length

    def mask(self, new_columns: int) -> Tensor | None:
        """The columns that new queries see, [B, 1, Q, S] with Q = 1 in a decoding step. None means all, causally."""
        if not self._padded:
            return None
        end = self.columns + new_columns
        visible_B1S = self._visible_BS[:, None, :end]
        if new_columns == 1:
            return visible_B1S[:, None]
        causal_SS = torch.ones(new_columns, end, dtype=torch.bool, device=visible_B1S.device).tril(end - new_columns)
        # A query at a padding column sees itself. Otherwise its softmax would be empty and its output NaN.
        itself_SS = torch.eye(new_columns, end, dtype=torch.bool, device=visible_B1S.device)
        return ((visible_B1S & causal_SS) | itself_SS)[:, None]

    def keep_rows(self, index_B: Tensor) -> None:
        """Drop all other rows."""
        self._visible_BS = self._visible_BS[index_B]
        self._padded = not bool(self._visible_BS[:, : self._prompt_columns].all())
        for layer, (keys, values) in self._keys_values.items():  # one by one, so memory never holds two caches
            columns = keys.shape[2]
            self._keys_values[layer] = (self._copy(keys, columns, index_B), self._copy(values, columns, index_B))


class SteadyCache(DecodingCache):
    """Whose decoding steps read and write the same tensors, of the same shapes, until `make_room` or `keep_rows`.

    So a step can be captured once and repeated. Attention reads all columns that there is room for, and a mask hides
    those that are not filled yet. The place of a new column is a tensor.
    """

    def __init__(self, visible_BS: Tensor, capacity: int) -> None:
        super().__init__(visible_BS, _round_up(capacity))
        self._column_1 = torch.zeros(1, dtype=torch.long, device=self.device)
        self._every_S = torch.arange(self._capacity, device=self.device)

    def append(self, layer: int, key_BHSD: Tensor, value_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write new columns of one layer. Returns all columns that there is room for, or those of the prompts."""
        if not self.columns:
            return super().append(layer, key_BHSD, value_BHSD)
        keys, values = self._keys_values[layer]
        return keys.index_copy_(2, self._column_1, key_BHSD), values.index_copy_(2, self._column_1, value_BHSD)

    def advance(self, length: int) -> None:
        """Count `length` columns as filled, after a forward pass has written them in all layers."""
        super().advance(length)
        self._column_1.fill_(self.columns)

    def mask(self, new_columns: int) -> Tensor | None:
        """The columns that new queries see, [B, 1, Q, S] with Q = 1 in a decoding step. None means all, causally."""
        if not self.columns:
            return super().mask(new_columns)
        room = self._keys_values[0][0].shape[2]
        filled_S = self._every_S[:room] <= self._column_1
        return (self._visible_BS[:, :room] & filled_S)[:, None, None]

    def make_room(self) -> bool:
        """Make room for the next column; returns whether tensors have moved for it."""
        if self._keys_values[0][0].shape[2] > self.columns:
            return False
        columns = self._room_for(self.columns + 1)
        for layer, (keys, values) in self._keys_values.items():
            self._keys_values[layer] = (self._copy(keys, columns), self._copy(values, columns))
        return True

    def _room_for(self, columns: int) -> int:
        """In steps that are wide enough to pay for a capture, and a multiple of what attention kernels like."""
        return min(self._capacity, _round_up(super()._room_for(columns + _STEADY_MARGIN)))

    def _copy(self, store: Tensor, columns: int, index_B: Tensor | None = None) -> Tensor:
        """As the other cache; what is not filled is 0, since a hidden column's value counts 0 times."""
        copy = super()._copy(store, columns, index_B)
        copy[:, :, self.columns :] = 0
        return copy


def _round_up(columns: int) -> int:
    return -(-columns // _STEADY_MULTIPLE) * _STEADY_MULTIPLE
