"""Divergences over the full vocabulary whose entries may be limited: the defence of OPSD (arXiv 2601.18734)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from oprd_tune.config.checks import check_positive
from oprd_tune.losses.token_loss import Comparison, DenseTokenLoss, row_dot
from oprd_tune.metrics.step import Metrics


@dataclass(kw_only=True, eq=False)
class EntryDivergence(DenseTokenLoss):
    """Base of divergences that are a sum of entries, each of which may be limited.

    Attributes:
        entry_clip: limits each entry d_v from above; an entry at the limit has no gradient. It keeps a few tokens, to
            which one model gives high and the other low probability, from carrying most of the gradient. None does not
            clip.

    Raises:
        ConfigError: for a limit that is not positive.
    """

    entry_clip: float | None = None
    usual_chunk: ClassVar[int] = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.entry_clip is not None:
            check_positive("loss.entry_clip", self.entry_clip)

    def entries(self, p_TV: Tensor, log_q_TV: Tensor, log_ratio_TV: Tensor) -> tuple[Tensor, Tensor]:
        """d and g, [T, V], from p, log q and log p − log q. They may overwrite the last two."""
        raise NotImplementedError

    def working_bytes(self, vocabulary: int, width: int) -> int:
        """As in `DenseTokenLoss`, with four more [chunk, V] tensors."""
        return super().working_bytes(vocabulary, width) + 4 * self.at_once * vocabulary * 4

    def objective(self, chunk: Comparison, metrics: Metrics) -> tuple[Tensor, Tensor]:
        """As in `DenseTokenLoss`."""
        log_q_TV = chunk.log_p_TV - chunk.log_ratio_TV
        p_TV = chunk.log_p_TV.exp_()
        metrics.add_each("token/kl", row_dot(p_TV, chunk.log_ratio_TV))
        d_TV, g_TV = self.entries(p_TV, log_q_TV, chunk.log_ratio_TV)
        if self.entry_clip is not None:
            over_TV = d_TV > self.entry_clip
            metrics.add_each("token/clipped_share", over_TV.any(-1).float())
            d_TV, g_TV = d_TV.clamp_(max=self.entry_clip), g_TV.masked_fill_(over_TV, 0)
        return d_TV.sum(-1), g_TV.sub_(p_TV.mul_(g_TV.sum(-1, keepdim=True)))
