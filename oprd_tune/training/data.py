"""A run's prompts and evaluators, checked against its models before weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oprd_tune.components import Components
from oprd_tune.data import PromptDataset, PromptStream
from oprd_tune.data.tokenizer import HuggingFaceTokenizer
from oprd_tune.ranks import Ranks
from oprd_tune.settings import OPRDSettings
from oprd_tune.training.evaluation import ReferencePerplexity, TaskAccuracy
from oprd_tune.training.pair import ModelPair


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        tokenizer: of both models.
        prompts: this rank's share of each step.
        task_accuracy: measures a model on held-out prompts; None if the config asks for none.
        reference_perplexity: likewise.
    """

    tokenizer: HuggingFaceTokenizer
    prompts: PromptStream
    task_accuracy: TaskAccuracy | None
    reference_perplexity: ReferencePerplexity | None


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
    tokenizer = make("tokenizer")
    train, held_out = (
        _load_dataset(make, name, tokenizer, s.max_prompt_tokens) for name in ("dataset", "eval_dataset")
    )
    assert train is not None
    pair.check_tokens(tokenizer, [dataset for dataset in (train, held_out) if dataset is not None])
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
    return RunData(tokenizer, prompts, accuracy, perplexity)


def _load_dataset(make: Components, name: str, tokenizer: Any, limit: int) -> PromptDataset | None:
    dataset: PromptDataset | None = make(name, tokenizer, max_prompt_tokens=limit)
    if dataset is not None and dataset.dropped:
        total = dataset.dropped + len(dataset)
        print(f"{name}: {dataset.dropped} of {total} prompts are empty or longer than {limit} tokens: dropped")
    return dataset
