"""The states and tokens of a microbatch that enter a loss, packed over its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Which states of a microbatch enter the loss.

    Attributes:
        index_T: positions in the flattened [B * S] grid of rows, or among the N tokens of packed ones; ascending and
            unique.
        part_T: which of 16 equal parts (0 to 15) of its response each selected token lies in; for metrics only.
        teacher_index_T: the teacher's matching positions. They equal `index_T`, unless the teacher has another
            tokenizer: then they are positions in its own [B * U] grid. They always count padding.
        weight_T: the weight of each token in the loss, 1 / (the number of selected tokens in its response) where all
            responses weigh the same; None where all tokens do.
    """

    index_T: Tensor
    part_T: Tensor
    teacher_index_T: Tensor
    weight_T: Tensor | None = None

    def __len__(self) -> int:
        return self.index_T.numel()

    @property
    def count(self) -> int:
        """N of the loss: the number of tokens or, if those of a response share one weight, of responses."""
        return _count(len(self), self.weight_T)


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of a microbatch, packed in row-major order. The other fields are those of `Rollout`.

    Attributes:
        index_T: for each token, the position of the state that predicts it, as in `Selection`.
        teacher_index_T: the teacher's matching positions, as in `Selection`; None stands for the same.
        weight_T: as in `Selection`.
        given_T: True for tokens of a reference answer; None if all were sampled.
        advantage_T: the advantage of each token's response, by a task's reward; None if nothing was graded.
    """

    index_T: Tensor
    tokens_T: Tensor
    sampler_logprobs_T: Tensor
    sampler_top_ids_TK: Tensor | None = None
    sampler_top_mass_T: Tensor | None = None
    teacher_index_T: Tensor | None = None
    weight_T: Tensor | None = None
    given_T: Tensor | None = None
    advantage_T: Tensor | None = None

    def __len__(self) -> int:
        return self.index_T.numel()

    @property
    def count(self) -> int:
        """N of the loss, as in `Selection`."""
        return _count(len(self), self.weight_T)

    def only(self, chosen_T: Tensor) -> ResponseTokens:
        """The tokens where `chosen_T` is True, or those with these indices."""
        return replace(self, **{k: v[chosen_T] for k, v in vars(self).items() if v is not None})

    def chunk(self, start: int, size: int) -> ResponseTokens:
        """The `size` tokens from `start` on, or fewer at the end."""
        return replace(self, **{k: v[start : start + size] for k, v in vars(self).items() if v is not None})


def _count(tokens: int, weight_T: Tensor | None) -> int:
    return tokens if weight_T is None else round(weight_T.sum(dtype=torch.float64).item())
