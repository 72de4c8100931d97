"""Reference answers in the place of sampled responses: the share λ of GKD (Agarwal et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from oprd_tune.data.stream import PromptStream
from oprd_tune.errors import RolloutError
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.responses import Response, joined, pack_responses, rows_of
from oprd_tune.types import Prompts, Rollout, SamplingRequest


class References:
    """Gives some of each step's prompts their reference answer, once each, instead of samples.

    Args:
        share: the share of a step's rows, or `[from, to]`, between which it goes linearly over the run, or
            `[from, to, steps]`, over its first steps. An answer is one row; a prompt that is sampled has
            `request.samples_per_prompt`.
        prompts: the run's stream, which has the answers.
        request: what training samples. Longer answers are cut and marked truncated, as samples are.
        prompts_per_step: of all ranks together.
        steps: the number of steps in the run.
    """

    def __init__(
        self,
        share: float | Sequence[float],
        prompts: PromptStream,
        request: SamplingRequest,
        ranks: Ranks,
        *,
        prompts_per_step: int,
        steps: int,
    ) -> None:
        first, last, *until = [share, share] if isinstance(share, (int, float)) else share
        self._first, self._last, self._until = first, last, int(until[0] if until else steps)
        self._prompts, self._request, self._ranks = prompts, request, ranks
        self._prompts_per_step = prompts_per_step
        self._counts: list[int] = []  # of prompts, by step
        self._owed = 0.0  # prompts that earlier steps have left over

    def share(self, step: int) -> float:
        """The share in a step, counted from 0. The last of the steps over which it changes has the last share."""
        progress = min(1.0, step / max(1, self._until - 1))
        return self._first + (self._last - self._first) * progress

    def count(self, step: int) -> int:
        """How many prompts of a step get their answer, over all ranks. The others are none, or at least one a rank.

        Prompts are whole, so a step may give more or fewer than its share. The next ones make up for it.
        """
        while len(self._counts) <= step:
            self._counts.append(self._next(self.share(len(self._counts))))
        return self._counts[step]

    def _next(self, share: float) -> int:
        everything, samples = self._prompts_per_step, self._request.samples_per_prompt
        if share in (0, 1):
            self._owed = 0.0
            return everything if share else 0
        self._owed += everything * share * samples / (1 + share * (samples - 1))
        given, most = max(0, round(self._owed)), everything - self._ranks.world_size
        if given > most:
            given = everything if self._owed > (everything + most) / 2 else most
        self._owed -= given
        return given

    def to_sample(self, prompts: Prompts, step: int) -> Prompts:
        """Those of this rank's prompts that the student answers: the last ones of the step, in the stream's order."""
        first = step * self._prompts_per_step
        return prompts.among(range(first + self.count(step), first + self._prompts_per_step))

    def beside(self, sampled: Rollout | None, prompts: Prompts, step: int) -> Rollout:
        """The rollout of all prompts: what was sampled, and the reference answers of the others.

        Raises:
            RolloutError: if an answer has a token that the models do not have.
        """
        asked = self.to_sample(prompts, step).positions
        given = prompts.among(set(prompts.positions) - set(asked))
        parts = [] if sampled is None else [replace(sampled, given_B=torch.zeros_like(sampled.truncated_B))]
        if given:
            answers = self._answers(given, step if sampled is None else sampled.policy_version)
            parts.append(replace(answers, given_B=torch.ones_like(answers.truncated_B)))
        return replace(rows_of(joined(parts), prompts.positions), logprob_gap=parts[0].logprob_gap)

    def _answers(self, prompts: Prompts, policy_version: int) -> Rollout:
        """Reference answers as responses. Nobody has sampled them, so their log-probabilities are 0."""
        request, responses = self._request, []
        for position in prompts.positions:
            tokens_T = torch.tensor(self._prompts.answer_tokens(position)[: request.max_new_tokens])
            if request.vocabulary is not None and int(tokens_T.max()) >= request.vocabulary:
                raise RolloutError(
                    f"reference_share: the reference answer to prompt {position} has the token {int(tokens_T.max())}, "
                    f"but the models' vocabulary ends at {request.vocabulary - 1}; take such rows out of the data"
                )
            zeros_T = torch.zeros(len(tokens_T))
            responses.append(Response(tokens_T, zeros_T, tokens_T[:, None][:, :0], zeros_T))
        return pack_responses(
            prompts,
            responses,
            samples_per_prompt=1,
            stop_tokens=request.stop_tokens,
            pad_id=request.pad_id,
            policy_version=policy_version,
            device=self._ranks.device,
        )
