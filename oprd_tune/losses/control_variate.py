"""vOPD (arXiv 2605.07865): the sampled-token estimate of the reverse KL with a control variate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oprd_tune.config.checks import check_whole
from oprd_tune.losses.reverse_kl import SampledReverseKL, exact_kl
from oprd_tune.losses.token_loss import Comparison
from oprd_tune.losses.topk_kl import check_k, renormalised_kl
from oprd_tune.metrics.step import Metrics
from oprd_tune.protocols import RolloutEngine


@dataclass(kw_only=True, eq=False)
class ControlVariateReverseKL(SampledReverseKL):
    """loss = −w · A · log p(y), where the advantage A = r + baseline carries no gradient.

    The baseline is the KL, because E_y r = −KL(p‖q) at a position. It does not depend on y, so the expected gradient
    stays the same. With the exact KL, E_y A = 0 and E_y A² ≤ E_y r².

    Attributes:
        baseline_k: None uses the exact KL over the vocabulary. A number uses the KL of both distributions renormalised
            on the student's top-k, as published. Both are unbiased. `reward_clip` does not apply to the baseline.
    """

    baseline_k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline_k is not None:
            check_whole("loss.baseline_k", self.baseline_k, at_least=2)

    def check(self, vocabulary: int, engine: RolloutEngine) -> None:
        super().check(vocabulary, engine)
        if self.baseline_k is not None:
            check_k("baseline_k", self.baseline_k, vocabulary)

    def baseline(self, chunk: Comparison, metrics: Metrics) -> tuple[Tensor, Tensor]:
        if self.baseline_k is None:
            return exact_kl(chunk, metrics)
        log_p_TK, ids_TK = chunk.log_p_TV.topk(self.baseline_k, dim=-1)
        baseline_T, _ = renormalised_kl(log_p_TK, log_p_TK - chunk.log_ratio_TV.gather(1, ids_TK))
        _, p_TV = exact_kl(chunk, metrics)
        return baseline_T, p_TV
