"""What one teacher of a run reads, checked against it before any weights are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from oprd_tune.config import construct
from oprd_tune.config.components import check_offers
from oprd_tune.data import PromptReader, PromptStream, Reader
from oprd_tune.errors import ConfigError, RolloutError
from oprd_tune.evaluation import TaskAccuracy
from oprd_tune.evaluation.during_training import BenchmarkEval
from oprd_tune.preflight.pair import ModelPair, whose
from oprd_tune.protocols import PromptSource, Tokenizer
from oprd_tune.ranks import Ranks
from oprd_tune.teacher.self_teaching import is_student
from oprd_tune.types import Prompts, Rollout


@dataclass(frozen=True)
class TeacherData:
    """What a teacher reads.

    Attributes:
        name: the teacher's name.
        prompts: this rank's share of each step's prompts, as if this teacher were the only one.
        reader: finds where the states of both models meet, if the teacher has other tokens or other prompts; else None.
        context: the number of tokens that the teacher can read.
        longest_row: the most tokens of a prompt and its response, as the teacher reads them; an estimate if it has
            other tokens than the student.
        min_matched_share: a response token is matched if it ends where a teacher's token ends too. A smaller share of
            matched tokens stops the run.
        accuracy: measures the teacher's accuracy on held-out prompts, in its own tokens; None if it is not measured.
        benchmarks: what the teacher answers once; None if it is not to.
    """

    name: str
    prompts: PromptStream
    reader: Reader | PromptReader | None
    context: int
    longest_row: int
    min_matched_share: float
    ranks: Ranks
    accuracy: TaskAccuracy | None = None
    benchmarks: BenchmarkEval | None = None

    def read(self, rollout: Rollout, prompts: Prompts) -> Rollout:
        """Add the teacher's reading to a rollout if the teacher has other tokens or prompts. Every rank must call.

        Raises:
            RolloutError: if too few response tokens end where a teacher's token ends.
        """
        if self.reader is None:
            return rollout
        assert prompts.teacher_tokens is not None
        prompt_at = dict(zip(prompts.positions, prompts.teacher_tokens, strict=True))
        reading = self.reader.read(rollout, [prompt_at[p] for p in rollout.prompt_positions_B.tolist()])
        rollout = replace(rollout, reading=reading.within(self.context))
        self.check_matched(rollout)
        return rollout

    def check_matched(self, rollout: Rollout) -> None:
        """Raise RolloutError if too few response tokens of all ranks are matched."""
        matched, tokens = self.ranks.total([rollout.matched_tokens, rollout.response_tokens])
        if matched < self.min_matched_share * tokens:
            raise RolloutError(
                f"only {matched / tokens:.1%} of the response tokens end where one of {whose(self.name)} ends too: the "
                "tokenizers cut the text differently, or responses are no text that the teacher's can read. Lower its "
                f"min_matched_share, which is {self.min_matched_share}, to go on with so few"
            )


def load_teacher_data(
    pair: ModelPair,
    train: PromptSource,
    tokenizer: Tokenizer,
    own_tokenizer: Tokenizer | None,
    ranks: Ranks,
    accuracy: TaskAccuracy | None,
    benchmarks: BenchmarkEval | None,
) -> TeacherData:
    """Find out what a teacher reads.

    Args:
        train: the prompts that it reads.
        tokenizer: the student's tokenizer.
        own_tokenizer: the teacher's; None if it reads the student's tokens.
        accuracy: see `TeacherData`, as `benchmarks`.

    Raises:
        ConfigError: if it cannot read a prompt.
    """
    _check_evaluation(pair, accuracy)
    s, share = pair.settings, {"rank": ranks.rank, "world_size": ranks.world_size}
    return TeacherData(
        name=pair.name,
        prompts=PromptStream(train, prompts_per_step=s.prompts_per_step, seed=s.seed, **share),
        reader=_reader(pair, train, tokenizer, own_tokenizer),
        context=pair.teacher_context,
        longest_row=min((train.longest_teacher_prompt or s.max_prompt_tokens) + s.max_new_tokens, pair.teacher_context),
        min_matched_share=s.min_matched_share,
        ranks=ranks,
        accuracy=accuracy,
        benchmarks=benchmarks,
    )


def _check_evaluation(pair: ModelPair, measured: TaskAccuracy | None) -> None:
    """Raise ConfigError if a teacher cannot read the held-out prompts, as it is to read them, with a response."""
    request = getattr(measured, "request", None)
    if not pair.settings.evaluate_teacher or request is None:
        return
    if request.longest_row > pair.teacher_context:
        raise ConfigError(
            f"the longest prompt of eval_dataset has {request.max_prompt_tokens} tokens as the teacher reads it, which "
            f"with task_accuracy.max_new_tokens = {request.max_new_tokens} exceeds its context of "
            f"{pair.teacher_context}; shorten eval_dataset.teacher_prompt_template, leave long rows out, or give "
            "evaluate_teacher=false"
        )


def _reader(
    pair: ModelPair, train: PromptSource, tokenizer: Any, teacher_tokenizer: Any
) -> Reader | PromptReader | None:
    """Finds where the states of both models meet; None if both read the same. Raises ConfigError as `load_data`."""
    s, parts = pair.settings, pair.parts
    if teacher_tokenizer is not None:
        reader = construct(parts.reader, tokenizer, teacher_tokenizer) or Reader(tokenizer, teacher_tokenizer)
        check_offers("reader", reader, Reader)
        pair.check_teacher_tokens(teacher_tokenizer, train)
        return reader
    if parts.reader is not None:
        raise ConfigError("reader aligns a teacher's own tokens with the student's; give teacher_tokenizer too")
    if train.longest_teacher_prompt is None:
        if s.teacher_is_student:
            raise ConfigError(
                "teacher_weights is live, but the teacher reads what the student reads, so they never differ; give "
                "dataset.teacher_prompt_template, with a column that helps, such as the answer"
            )
        if is_student(parts.record):
            print(
                f"{pair.name}: it begins with the student's weights and reads what the student reads, so at first "
                "there is nothing to learn from it; dataset.teacher_prompt_template lets it read more"
            )
        return None
    _check_teacher_prompts(pair, train)
    return PromptReader(tokenizer.pad_id)


def _check_teacher_prompts(pair: ModelPair, train: PromptSource) -> None:
    """Raise ConfigError if a teacher cannot read its own prompts, or a response behind them to its end."""
    s = pair.settings
    largest, longest = getattr(train, "largest_teacher_token", None) or 0, train.longest_teacher_prompt or 0
    if largest >= pair.teacher_vocabulary:
        raise ConfigError(
            f"dataset.teacher_prompt_template gives the token {largest}, but the teacher's vocabulary ends at "
            f"{pair.teacher_vocabulary - 1}; write it with other characters"
        )
    if longest + s.max_new_tokens > pair.teacher_context:
        raise ConfigError(
            f"the longest prompt has {longest} tokens as the teacher reads it, which with max_new_tokens = "
            f"{s.max_new_tokens} exceeds its context of {pair.teacher_context}; shorten "
            "dataset.teacher_prompt_template, leave long rows out, or lower max_new_tokens"
        )
