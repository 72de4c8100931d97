"""Sampling with the trainer's own model, without a second copy of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torchtune.modules import TransformerDecoder

from oprd_tune.config.checks import check_not_negative, check_whole
from oprd_tune.protocols import Policy
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.native.sampler import Sampler, sampling_bytes
from oprd_tune.types import Prompts, Rollout, SamplingRequest


@dataclass(kw_only=True, eq=False)
class NativeEngine:
    """An engine in which the student itself samples. `oprd_tune.protocols.RolloutEngine` describes its methods.

    Attributes:
        temperature: 1 is on-policy; 0 is greedy. Log-probabilities are always those at temperature 1.
        batch_size: the most rows decoded at once, which bounds the cache's memory; None decodes all rows at once.

    Raises:
        ConfigError: if the temperature is negative or the batch size below 1.
    """

    temperature: float = 1.0
    batch_size: int | None = None

    samples_with_student: ClassVar[bool] = True
    free_on_resume: ClassVar[tuple[str, ...]] = ("batch_size",)

    def __post_init__(self) -> None:
        check_not_negative("rollout.temperature", self.temperature)
        if self.batch_size is not None:
            check_whole("rollout.batch_size", self.batch_size)
        self._policy_version = 0

    def check(self, device: torch.device, ranks: Ranks) -> None:
        """Check nothing: this engine works wherever the student does."""

    def memory_bytes(
        self, model: TransformerDecoder, *, rows: int, columns: int, dtype: torch.dtype
    ) -> tuple[int, int]:
        """Bytes held between rollouts, which are none, and while sampling: keys, values and logits."""
        rows_at_once = min(rows, self.batch_size or rows)
        return 0, sampling_bytes(model, rows=rows_at_once, columns=columns, dtype=dtype)

    def start(self, policy: Policy, request: SamplingRequest, *others: SamplingRequest) -> None:
        """Keep the student and the request. Other requests need no preparation."""
        self._model, self._request = policy.model, request

    def sync_weights(self, policy_version: int) -> None:
        """Note the version. The weights are the trainer's own."""
        self._policy_version = policy_version

    def generate(self, prompts: Prompts, *, stream: int = 0, request: SamplingRequest | None = None) -> Rollout:
        """Sample responses. All ranks must call, since a sharded student is gathered for it."""
        asked = request or self._request
        sampler = Sampler(self._model, asked, temperature=self.temperature, batch_size=self.batch_size)
        return sampler.sample(prompts, stream=stream, policy_version=self._policy_version)

    def close(self) -> None:
        """Do nothing: this engine holds nothing between rollouts."""
