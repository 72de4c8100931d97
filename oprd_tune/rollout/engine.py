"""What a recipe needs from whatever samples its responses."""

from __future__ import annotations

from typing import ClassVar, Protocol

from oprd_tune.types import Prompts, Rollout


class RolloutEngine(Protocol):
    """Samples responses with the weights of the last `sync_weights`.

    Attributes:
        samples_with_student: whether the trainer's own model samples.
    """

    samples_with_student: ClassVar[bool]

    def generate(self, prompts: Prompts, *, stream: int = 0) -> Rollout:
        """Sample `samples_per_prompt` responses to each prompt, rows of one prompt side by side.

        Args:
            prompts: what to answer.
            stream: separates the noise of otherwise equal calls, such as training steps.
        """

    def sync_weights(self, policy_version: int) -> None:
        """Take over the trainer's weights; rollouts carry `policy_version` from now on."""
