"""A task's reward for each sampled response, as the advantages that `TaskReward` reads."""

from __future__ import annotations

from dataclasses import replace

import torch

from oprd_tune.config import OPRDSettings
from oprd_tune.errors import ConfigError
from oprd_tune.evaluation.texts import decode_responses
from oprd_tune.grading.calls import grade_all
from oprd_tune.losses.beside import TaskReward
from oprd_tune.losses.composite import Composite
from oprd_tune.metrics.step import Metrics
from oprd_tune.preflight.data import RunData
from oprd_tune.types import Prompts, Rollout


class Rewards:
    """Grades the responses of a step if a part of the loss needs it.

    Raises:
        ConfigError: if it does, but prompts have no answers, or there is one response to each.
    """

    def __init__(self, loss: Composite, data: RunData, settings: OPRDSettings) -> None:
        found = [part for part in loss.parts.values() if isinstance(part, TaskReward)]
        if len(found) > 1:
            raise ConfigError("loss.parts has more than one TaskReward; there may be one")
        self._part, self._tokenizer = found[0] if found else None, data.tokenizer
        self._teachers, self._ranks = [*data.teachers], data.ranks
        if self._part is None:
            return
        if not data.has_answers:
            raise ConfigError("TaskReward grades responses against reference answers; give dataset.answer_column")
        if settings.samples_nothing:
            raise ConfigError("TaskReward grades samples, and reference_share is 1, so there are none; lower it")
        if settings.samples_per_prompt < 2:
            raise ConfigError(
                "TaskReward compares the responses to one prompt with each other, and samples_per_prompt is 1; give 4 "
                "or more"
            )

    @property
    def needed(self) -> bool:
        """Whether a part of the loss reads advantages."""
        return self._part is not None

    def __call__(self, rollout: Rollout, prompts: Prompts, metrics: Metrics) -> Rollout:
        """The rollout with the advantage of each response; reference answers have none. Only where it is `needed`."""
        assert self._part is not None
        rows = range(len(rollout)) if rollout.given_B is None else (~rollout.given_B).nonzero().flatten().tolist()
        index_N = torch.tensor([*rows], dtype=torch.long, device=rollout.tokens_BS.device)
        texts = decode_responses(rollout.tokens_BS[index_N], rollout.response_mask_BS[index_N], self._tokenizer)
        answer_to = dict(zip(prompts.positions, prompts.answers, strict=True))
        group_N = rollout.prompt_positions_B[index_N]
        pairs = [(text, str(answer_to[group])) for text, group in zip(texts, group_N.tolist(), strict=True)]
        grader = self._part.grade
        verdicts = self._ranks.agree(lambda: grade_all(grader, pairs))
        reward_N = torch.tensor(verdicts, dtype=torch.float32, device=index_N.device)
        metrics.add("rollout/reward", float(sum(verdicts)), len(verdicts))
        if rollout.teacher_B is not None:
            for number, name in enumerate(self._teachers):
                own_N = reward_N[rollout.teacher_B[index_N] == number]
                metrics.add(f"teachers/{name}/rollout/reward", float(own_N.sum()), len(own_N))
        advantage_B = torch.zeros(len(rollout), device=index_N.device)
        advantage_B[index_N] = self._part.advantages(reward_N, group_N)
        return replace(rollout, advantage_B=advantage_B)
