"""A run's prompts and evaluators, checked against its models before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from oprd_tune.config import OPRDSettings, Parts, construct
from oprd_tune.config.components import check_offers
from oprd_tune.data import PromptReader, PromptStream, Reader
from oprd_tune.errors import ConfigError, RolloutError
from oprd_tune.evaluation import ReferencePerplexity, TaskAccuracy
from oprd_tune.evaluation.during_training import BenchmarkEval
from oprd_tune.preflight.pair import ModelPair
from oprd_tune.protocols import PromptSource, Tokenizer
from oprd_tune.ranks import Ranks
from oprd_tune.teacher.self_teaching import is_student
from oprd_tune.training.references import References
from oprd_tune.types import Prompts, Rollout, SamplingRequest

_ANSWERS_CHECKED = 1000  # of the training data, which may be large; the others are checked when their step comes


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        tokenizer: the tokenizer of both models, or of the student if the teacher has another one.
        prompts: this rank's share of each step's prompts.
        request: what training samples of each.
        task_accuracy: measures the student's accuracy on held-out prompts; None if the config asks for none.
        teacher_accuracy: measures the teacher's accuracy, in the teacher's own tokens; None likewise.
        reference_perplexity: measures the student's perplexity on held-out answers; None likewise.
        reader: finds where the states of both models meet, if the teacher has other tokens or other prompts; else None.
        teacher_context: the number of tokens that the teacher can read.
        min_matched_share: a response token is matched if it ends where a teacher's token ends too. A smaller share of
            matched tokens stops the run.
        counts: by the config key of a data set, how many of its prompts are used, were dropped and why, and have no
            answer.
        benchmarks: what the student answers while it trains; None if the config has no section `eval`.
        references: put reference answers in the place of some samples; None if all are sampled.
        has_answers: whether every prompt has a reference answer.
        teacher_benchmarks: the same for the teacher, in its own tokens; None if it is not to answer them.
    """

    tokenizer: Tokenizer
    prompts: PromptStream
    request: SamplingRequest
    task_accuracy: TaskAccuracy | None
    teacher_accuracy: TaskAccuracy | None
    reference_perplexity: ReferencePerplexity | None
    reader: Reader | PromptReader | None
    teacher_context: int
    min_matched_share: float
    ranks: Ranks
    counts: Mapping[str, Mapping[str, int]]
    benchmarks: BenchmarkEval | None = None
    teacher_benchmarks: BenchmarkEval | None = None
    references: References | None = None
    has_answers: bool = False

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
        rollout = replace(rollout, reading=reading.within(self.teacher_context))
        matched, tokens = self.ranks.total([rollout.matched_tokens, rollout.response_tokens])
        if matched < self.min_matched_share * tokens:
            raise RolloutError(
                f"only {matched / tokens:.1%} of the response tokens end where one of the teacher's ends too: the "
                "tokenizers cut the text differently, or responses are no text that the teacher's can read. Lower "
                f"min_matched_share, which is {self.min_matched_share}, to go on with so few"
            )
        return rollout


def load_data(parts: Parts, settings: OPRDSettings, pair: ModelPair, ranks: Ranks) -> RunData:
    """Construct tokenizers, data sets and evaluators. The ranks share the prompts.

    Raises:
        ConfigError: if a model lacks a token or is too short for a length, or if a component is missing.
    """
    s = settings
    tokenizer, teacher_tokenizer = parts.tokenizer(), construct(parts.teacher_tokenizer)
    check_offers("tokenizer", tokenizer, Tokenizer)
    given: dict[str, Any] = {"max_prompt_tokens": s.max_prompt_tokens}
    given |= {} if teacher_tokenizer is None else {"teacher_tokenizer": teacher_tokenizer}
    train: PromptSource = parts.dataset(tokenizer, **given)
    held_out: PromptSource | None = construct(parts.eval_dataset, tokenizer, **given)
    datasets = {"dataset": train} | ({} if held_out is None else {"eval_dataset": held_out})
    for name, dataset in datasets.items():
        check_offers(name, dataset, PromptSource)
        if dataset.dropped:
            print(f"{name}: {_dropped(dataset, s.max_prompt_tokens)}")
    pair.check_tokens(tokenizer, list(datasets.values()))
    if held_out is not None and held_out.has_answers and (parts.task_accuracy or parts.reference_perplexity):
        pair.check_answers("eval_dataset", held_out)
    evaluator = {"vocabulary": pair.vocabulary, "ranks": ranks}
    accuracy = construct(parts.task_accuracy, held_out, tokenizer, **evaluator)
    perplexity = construct(parts.reference_perplexity, held_out, tokenizer, **evaluator)
    if accuracy is not None:
        check_offers("task_accuracy", accuracy, TaskAccuracy)
    if perplexity is not None:
        check_offers("reference_perplexity", perplexity, ReferencePerplexity)
    reader = _reader(parts, s, pair, train, tokenizer, teacher_tokenizer)
    teacher_accuracy = accuracy
    if held_out is not None and held_out.longest_teacher_prompt is not None:
        own, its = held_out.as_teacher_reads(), teacher_tokenizer or tokenizer
        vocabulary = pair.vocabulary if teacher_tokenizer is None else pair.teacher_vocabulary
        teacher_accuracy = construct(parts.task_accuracy, own, its, **evaluator | {"vocabulary": vocabulary})
    _check_lengths(s, pair, accuracy, perplexity)
    benchmarks, teacher_benchmarks = _open_benchmarks(parts, pair, tokenizer, teacher_tokenizer, ranks)
    prompts = PromptStream(
        train, prompts_per_step=s.prompts_per_step, seed=s.seed, rank=ranks.rank, world_size=ranks.world_size
    )
    request = _request(s, pair, tokenizer)
    return RunData(
        tokenizer=tokenizer,
        prompts=prompts,
        request=request,
        task_accuracy=accuracy,
        teacher_accuracy=teacher_accuracy,
        reference_perplexity=perplexity,
        reader=reader,
        teacher_context=pair.teacher_context,
        min_matched_share=s.min_matched_share,
        ranks=ranks,
        counts={name: _counts(dataset) for name, dataset in datasets.items()},
        benchmarks=benchmarks,
        teacher_benchmarks=teacher_benchmarks,
        references=_references(s, train, pair, prompts, request, ranks),
        has_answers=train.has_answers,
    )


def _request(s: OPRDSettings, pair: ModelPair, tokenizer: Tokenizer) -> SamplingRequest:
    """What training samples."""
    return SamplingRequest(
        stop_tokens=tokenizer.stop_tokens,
        pad_id=tokenizer.pad_id,
        max_prompt_tokens=s.max_prompt_tokens,
        max_new_tokens=s.max_new_tokens,
        samples_per_prompt=s.samples_per_prompt,
        seed=s.seed,
        vocabulary=pair.vocabulary,
    )


def _reader(
    parts: Parts,
    s: OPRDSettings,
    pair: ModelPair,
    train: PromptSource,
    tokenizer: Any,
    teacher_tokenizer: Any,
) -> Reader | PromptReader | None:
    """Finds where the states of both models meet; None if both read the same. Raises ConfigError as `load_data`."""
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
                "teacher: it begins with the student's weights and reads what the student reads, so at first there is "
                "nothing to learn from it; dataset.teacher_prompt_template lets it read more"
            )
        return None
    _check_teacher_prompts(s, pair, train)
    return PromptReader(tokenizer.pad_id)


def _references(
    s: OPRDSettings,
    dataset: PromptSource,
    pair: ModelPair,
    prompts: PromptStream,
    request: SamplingRequest,
    ranks: Ranks,
) -> References | None:
    """The answers in the place of samples. Raises ConfigError if there are none, or if no model can say one."""
    if not s.takes_references:
        return None
    if not dataset.has_answers:
        raise ConfigError(
            "reference_share takes reference answers in the place of samples, and some prompts of `dataset` have none; "
            "give dataset.answer_column, or take the rows without an answer out"
        )
    pair.check_answers("dataset", dataset, most=_ANSWERS_CHECKED)
    return References(
        s.reference_share, prompts, request, ranks, prompts_per_step=s.prompts_per_step, steps=s.max_steps
    )


def _counts(dataset: PromptSource) -> Mapping[str, int]:
    """What the summary says of a data set's prompts; one of the user's may not tell why it dropped some."""
    return getattr(dataset, "counts", {"used": len(dataset), "dropped": dataset.dropped})


def _dropped(dataset: PromptSource, limit: int) -> str:
    """How many prompts were dropped, and why."""
    total, counts = dataset.dropped + len(dataset), _counts(dataset)
    each = f"{counts['empty']} empty, {counts['too_long']} longer" if "empty" in counts else "empty or longer"
    return f"{dataset.dropped} of {total} prompts are dropped: {each} than {limit} tokens"


def _open_benchmarks(
    parts: Parts, pair: ModelPair, tokenizer: Tokenizer, teacher_tokenizer: Tokenizer | None, ranks: Ranks
) -> tuple[BenchmarkEval | None, BenchmarkEval | None]:
    """The benchmarks of the section `eval` for the student and, if it is to answer them too, for the teacher."""
    if parts.eval is None:
        return None, None
    found = BenchmarkEval.open(parts.eval, tokenizer, pair.vocabulary, ranks)
    found.problems.check_fit("eval", vocabulary=pair.vocabulary, context=pair.context)
    if not parts.eval.teacher:
        return found, None
    if teacher_tokenizer is None:
        return found, found
    own = BenchmarkEval.open(parts.eval, teacher_tokenizer, pair.teacher_vocabulary, ranks)
    own.problems.check_fit("eval, for the teacher", vocabulary=pair.teacher_vocabulary, context=pair.teacher_context)
    return found, own


def _check_teacher_prompts(s: OPRDSettings, pair: ModelPair, train: PromptSource) -> None:
    """Raise ConfigError if a teacher cannot read its own prompts, or a response behind them to its end."""
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


def _check_lengths(
    s: OPRDSettings, pair: ModelPair, accuracy: TaskAccuracy | None, perplexity: ReferencePerplexity | None
) -> None:
    """Raise ConfigError if a sequence of the run does not fit into the models' context."""
    lengths = {"max_prompt_tokens + max_new_tokens": s.max_prompt_tokens + s.max_new_tokens}
    if accuracy is not None:
        longest = s.max_prompt_tokens + accuracy.request.max_new_tokens
        lengths["max_prompt_tokens + task_accuracy.max_new_tokens"] = longest
    if perplexity is not None:
        lengths["the longest reference answer with its prompt"] = perplexity.longest
    for what, length in lengths.items():
        if length > pair.context:
            raise ConfigError(f"{what} = {length} exceeds the models' context of {pair.context}; lower it")
