"""What a recipe needs from whatever samples its responses."""

from __future__ import annotations

from typing import ClassVar, Protocol

from oprd_tune.types import Prompts, Rollout


class RolloutEngine(Protocol):
    """Samples responses with the weights of the last `sync_weights`.

    It is constructed with the student and with what the recipe asks for: `stop_tokens`, `pad_id`, `max_new_tokens`,
    `samples_per_prompt`, `seed`, `vocabulary`, and `top_k_ids` where a loss wants them. One that keeps weights of its
    own also gets `max_prompt_tokens`, the student's `weights` (a `PolicyWeights`) and the run's `folder`.

    Attributes:
        samples_with_student: whether the trainer's own model samples.
    """

    samples_with_student: ClassVar[bool]

    def generate(self, prompts: Prompts, *, stream: int = 0) -> Rollout:
        """Sample `samples_per_prompt` responses to each prompt, rows of one prompt side by side.

        Args:
            prompts: what to answer.
            stream: separates the noise of otherwise equal calls, such as training steps.

        Raises:
            RolloutError: if that fails, or if the responses are not proven to be the current student's.
        """

    def sync_weights(self, policy_version: int) -> None:
        """Take over the trainer's weights; rollouts carry `policy_version` from now on.

        Raises:
            RolloutError: if that fails.
        """

    def close(self) -> None:
        """Free what the engine holds. It cannot be used afterwards."""
