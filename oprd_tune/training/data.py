"""A run's prompts and evaluators, checked against its models before weights are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from oprd_tune.components import Components
from oprd_tune.data import PromptDataset, PromptStream, Reader
from oprd_tune.data.tokenizer import HuggingFaceTokenizer
from oprd_tune.errors import RolloutError
from oprd_tune.ranks import Ranks
from oprd_tune.settings import OPRDSettings
from oprd_tune.training.evaluation import ReferencePerplexity, TaskAccuracy
from oprd_tune.training.pair import ModelPair
from oprd_tune.types import Prompts, Rollout


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        tokenizer: of both models, or of the student if the teacher has its own.
        prompts: this rank's share of each step.
        task_accuracy: measures a model on held-out prompts; None if the config asks for none.
        teacher_accuracy: the same for the teacher, in its own tokens.
        reference_perplexity: measures the student on held-out answers; None likewise.
        reader: aligns the teacher's own tokens with the student's; None if they share them.
        teacher_context: tokens that the teacher can read.
        min_matched_share: of response tokens that end where one of the teacher's ends too; less stops the run.
        ranks: of the run.
    """

    tokenizer: HuggingFaceTokenizer
    prompts: PromptStream
    task_accuracy: TaskAccuracy | None
    teacher_accuracy: TaskAccuracy | None
    reference_perplexity: ReferencePerplexity | None
    reader: Reader | None
    teacher_context: int
    min_matched_share: float
    ranks: Ranks

    def read(self, rollout: Rollout, prompts: Prompts) -> Rollout:
        """The rollout as the teacher reads it too, if it has a tokenizer of its own. Every rank must call.

        Raises:
            RolloutError: if the two tokenizations meet too rarely.
        """
        if self.reader is None:
            return rollout
        assert prompts.teacher_tokens is not None
        prompt_at = dict(zip(prompts.positions, prompts.teacher_tokens, strict=True))
        reading = self.reader.read(rollout, [prompt_at[p] for p in rollout.prompt_positions_B.tolist()])
        rollout = replace(rollout, reading=reading.within(self.teacher_context))
        matched, tokens = self.ranks.total([rollout.matched_tokens, rollout.response_tokens])
        if matched < self.min_matched_share * tokens:
            raise RolloutError(
                f"only {matched / tokens:.1%} of the response tokens end where one of the teacher's ends too: the "
                "tokenizers cut the text differently, or responses are no text that the teacher's can read. "
                f"min_matched_share is {self.min_matched_share}"
            )
        return rollout


def load_data(make: Components, settings: OPRDSettings, pair: ModelPair, ranks: Ranks) -> RunData:
    """Construct tokenizer, data sets and evaluators.

    Args:
        make: constructs components.
        settings: lengths, sizes and the seed.
        pair: the models, which have to know every token and fit every length.
        ranks: the processes that share the prompts.

    Raises:
        ConfigError: if data and models do not fit, or something is missing.
    """
    s = settings
    tokenizer, teacher_tokenizer = make("tokenizer"), make("teacher_tokenizer")
    own = {} if teacher_tokenizer is None else {"teacher_tokenizer": teacher_tokenizer}
    train = _load_dataset(make, "dataset", tokenizer, s.max_prompt_tokens, **own)
    held_out = _load_dataset(make, "eval_dataset", tokenizer, s.max_prompt_tokens, **own)
    assert train is not None
    pair.check_tokens(tokenizer, [dataset for dataset in (train, held_out) if dataset is not None])
    reader = None if teacher_tokenizer is None else Reader(tokenizer, teacher_tokenizer)
    if reader is not None:
        pair.check_teacher_tokens(teacher_tokenizer, train)
    prompts = PromptStream(
        train, prompts_per_step=s.prompts_per_step, seed=s.seed, rank=ranks.rank, world_size=ranks.world_size
    )
    evaluators = [
        make(name, held_out, tokenizer, vocabulary=pair.vocabulary, ranks=ranks)
        for name in ("task_accuracy", "reference_perplexity")
    ]
    accuracy, perplexity = evaluators
    lengths = {"max_prompt_tokens + max_new_tokens": s.max_prompt_tokens + s.max_new_tokens}
    if accuracy is not None:
        longest = s.max_prompt_tokens + accuracy.max_new_tokens
        lengths["max_prompt_tokens + task_accuracy.max_new_tokens"] = longest
    if perplexity is not None:
        lengths["the longest reference answer with its prompt"] = perplexity.longest
    pair.check_lengths(lengths)
    teacher_accuracy = accuracy
    if reader is not None and held_out is not None:
        teacher_accuracy = make(
            *("task_accuracy", held_out.as_teacher_reads(), teacher_tokenizer),
            vocabulary=pair.teacher_vocabulary,
            ranks=ranks,
        )
    return RunData(
        tokenizer=tokenizer,
        prompts=prompts,
        task_accuracy=accuracy,
        teacher_accuracy=teacher_accuracy,
        reference_perplexity=perplexity,
        reader=reader,
        teacher_context=pair.teacher_context,
        min_matched_share=s.min_matched_share,
        ranks=ranks,
    )


def _load_dataset(make: Components, name: str, tokenizer: Any, limit: int, **own: Any) -> PromptDataset | None:
    dataset: PromptDataset | None = make(name, tokenizer, max_prompt_tokens=limit, **own)
    if dataset is not None and dataset.dropped:
        total = dataset.dropped + len(dataset)
        print(f"{name}: {dataset.dropped} of {total} prompts are empty or longer than {limit} tokens: dropped")
    return dataset
