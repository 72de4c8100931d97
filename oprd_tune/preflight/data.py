"""A run's prompts and evaluators, checked against its models before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from oprd_tune.config import ONLY_TEACHER, OPRDSettings, Parts, construct
from oprd_tune.config.components import check_offers, takes
from oprd_tune.data import PromptReader, PromptStream, RoutedPrompts
from oprd_tune.data.alignment import side_by_side
from oprd_tune.data.routing import PromptsOfTeacher
from oprd_tune.data.unwritable import missing
from oprd_tune.errors import ConfigError
from oprd_tune.evaluation import AccuracyByTeacher, ReferencePerplexity, TaskAccuracy
from oprd_tune.evaluation.during_training import BenchmarkEval
from oprd_tune.preflight.evaluators import Evaluators
from oprd_tune.preflight.pair import ModelPair, ModelPairs, of_teacher
from oprd_tune.preflight.teacher_data import TeacherData, load_teacher_data
from oprd_tune.protocols import PromptSource, Tokenizer
from oprd_tune.ranks import Ranks
from oprd_tune.training.references import References
from oprd_tune.types import Prompts, Rollout, SamplingRequest

_ANSWERS_CHECKED = 1000  # of the training data, which may be large; the others are checked when their step comes


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        tokenizer: the tokenizer of the models, or of the student alone if no teacher shares it.
        prompts: this rank's share of each step's prompts.
        request: what training samples of each.
        task_accuracy: measures the student's accuracy on held-out prompts; None if the config asks for none.
        reference_perplexity: measures the student's perplexity on held-out answers; None likewise.
        teachers: what each teacher reads, by its name.
        counts: by the config key of a data set, how many of its prompts are used, were dropped and why, and have no
            answer.
        benchmarks: what the student answers while it trains; None if the config has no section `eval`.
        references: put reference answers in the place of some samples; None if all are sampled.
        has_answers: whether every prompt has a reference answer.
    """

    tokenizer: Tokenizer
    prompts: PromptStream
    request: SamplingRequest
    task_accuracy: TaskAccuracy | AccuracyByTeacher | None
    reference_perplexity: ReferencePerplexity | None
    teachers: Mapping[str, TeacherData]
    ranks: Ranks
    counts: Mapping[str, Mapping[str, int]]
    benchmarks: BenchmarkEval | None = None
    references: References | None = None
    has_answers: bool = False

    @property
    def teacher_benchmarks(self) -> BenchmarkEval | None:
        """What the only teacher answers once; None if it is not to."""
        return next((one.benchmarks for one in self.teachers.values()), None)

    def read(self, rollout: Rollout, prompts: Prompts) -> Rollout:
        """Add to a rollout who reads each row, and how, where that is not the one teacher as the student.

        Every rank must call. Raises RolloutError as `TeacherData.read`.
        """
        if prompts.teachers is None:
            return next(iter(self.teachers.values())).read(rollout, prompts)
        number = {name: i for i, name in enumerate(self.teachers)}
        names = dict(zip(prompts.positions, prompts.teachers, strict=True))
        teachers = [number[names[position]] for position in rollout.prompt_positions_B.tolist()]
        rollout = replace(rollout, teacher_B=torch.tensor(teachers, device=rollout.tokens_BS.device))
        if prompts.teacher_tokens is None:
            return rollout
        prompt_at, parts = dict(zip(prompts.positions, prompts.teacher_tokens, strict=True)), []
        for i, teacher in enumerate(self.teachers.values()):
            assert rollout.teacher_B is not None
            index_B = (rollout.teacher_B == i).nonzero(as_tuple=True)[0]
            own = rollout.rows(index_B)
            if len(index_B):
                reader = teacher.reader or PromptReader(self.tokenizer.pad_id)
                reading = reader.read(own, [prompt_at[p] for p in own.prompt_positions_B.tolist()])
                reading = reading.within(teacher.context)
                own = replace(own, reading=reading)
                parts.append((index_B, reading))
            teacher.check_matched(own)
        return replace(rollout, reading=side_by_side(parts))


def load_data(parts: Parts, settings: OPRDSettings, pairs: ModelPairs, ranks: Ranks) -> RunData:
    """Construct tokenizers, data sets and evaluators. The ranks share the prompts.

    Raises:
        ConfigError: if a model lacks a token or is too short for a length, or if a component is missing.
    """
    s, tokenizer = settings, parts.tokenizer()
    own_tokenizers = {pair.name: construct(pair.parts.teacher_tokenizer) for pair in pairs}
    check_offers("tokenizer", tokenizer, Tokenizer)
    train: PromptSource = parts.dataset(tokenizer, **_given("dataset", parts, s, own_tokenizers))
    held_out: PromptSource | None = construct(
        parts.eval_dataset, tokenizer, **_given("eval_dataset", parts, s, own_tokenizers)
    )
    datasets = {"dataset": train} | ({} if held_out is None else {"eval_dataset": held_out})
    for name, dataset in datasets.items():
        check_offers(name, dataset, PromptSource)
        if dataset.dropped:
            print(f"{name}: {_dropped(dataset, s.max_prompt_tokens)}")
    pairs.check_tokens(tokenizer, list(datasets.values()))
    if held_out is not None and held_out.has_answers and (parts.task_accuracy or parts.reference_perplexity):
        pairs.check_answers("eval_dataset", held_out)
    evaluate = Evaluators(parts, pairs, tokenizer, own_tokenizers, ranks)
    accuracy, perplexity = evaluate.accuracy(held_out), evaluate.perplexity(held_out)
    benchmarks = evaluate.benchmarks()
    prompts = PromptStream(
        train, prompts_per_step=s.prompts_per_step, seed=s.seed, rank=ranks.rank, world_size=ranks.world_size
    )
    _check_lengths(s, pairs, accuracy, perplexity)
    teachers = {}
    for pair in pairs:
        with of_teacher(pair.name):
            teachers[pair.name] = load_teacher_data(
                *(pair, _part(train, pair), tokenizer, own_tokenizers[pair.name], ranks),
                accuracy=evaluate.teacher_accuracy(pair, held_out, accuracy),
                benchmarks=evaluate.teacher_benchmarks(pair, benchmarks),
            )
    request = _request(s, pairs, tokenizer)
    return RunData(
        tokenizer=tokenizer,
        prompts=prompts,
        request=request,
        task_accuracy=accuracy,
        reference_perplexity=perplexity,
        teachers=teachers,
        ranks=ranks,
        counts={name: _counts(dataset) for name, dataset in datasets.items()},
        benchmarks=benchmarks,
        references=_references(s, train, tokenizer, pairs, prompts, request, ranks),
        has_answers=train.has_answers,
    )


def _given(name: str, parts: Parts, s: OPRDSettings, own_tokenizers: Mapping[str, Tokenizer | None]) -> dict[str, Any]:
    """What a data set gets from the recipe."""
    given: dict[str, Any] = {"max_prompt_tokens": s.max_prompt_tokens}
    if not parts.teachers:
        own = own_tokenizers[ONLY_TEACHER]
        return given | ({} if own is None else {"teacher_tokenizer": own})
    component = getattr(parts, name)
    if component is None:
        return given
    routes = takes(component.path, "teachers")
    if name == "dataset" and not routes:
        raise ConfigError(
            f"the config has `teachers`, and {component.path} does not say who reads a prompt; give a data set that "
            "takes `teachers`, such as oprd_tune.data.prompt_dataset with a teacher_column"
        )
    if name == "eval_dataset" and takes(component.path, "teacher_column"):
        routes = component.arguments.get("teacher_column") is not None
    teachers = {name: PromptsOfTeacher(entry.prompts, own_tokenizers[name]) for name, entry in parts.teachers.items()}
    return given | ({"teachers": teachers} if routes else {})


def _part(train: PromptSource, pair: ModelPair) -> PromptSource:
    """The prompts that a teacher reads. Raises ConfigError if there are none."""
    if pair.name == ONLY_TEACHER:
        return train
    found = train.parts.get(pair.name) if isinstance(train, RoutedPrompts) else None
    if found is None:
        raise ConfigError(
            "it reads no prompt of `dataset`; take it out, or list what the column says of its prompts as its `prompts`"
        )
    return found


def _request(s: OPRDSettings, pairs: ModelPairs, tokenizer: Tokenizer) -> SamplingRequest:
    """What training samples."""
    return SamplingRequest(
        stop_tokens=tokenizer.stop_tokens,
        pad_id=tokenizer.pad_id,
        max_prompt_tokens=s.max_prompt_tokens,
        max_new_tokens=s.max_new_tokens,
        samples_per_prompt=s.samples_per_prompt,
        seed=s.seed,
        vocabulary=pairs.vocabulary,
    )


def _references(
    s: OPRDSettings,
    dataset: PromptSource,
    tokenizer: Tokenizer,
    pairs: ModelPairs,
    prompts: PromptStream,
    request: SamplingRequest,
    ranks: Ranks,
) -> References | None:
    """The answers in the place of samples. Raises ConfigError if there are none, or if no model can say one."""
    if not s.takes_references:
        return None
    if not dataset.has_answers:
        raise ConfigError(
            f"reference_share takes reference answers in the place of samples, and {_unanswered(dataset)} of `dataset` "
            "have none; give dataset.answer_column, or take the rows without an answer out"
        )
    pairs.check_answers("dataset", dataset, most=_ANSWERS_CHECKED)
    _tell_of_answers(dataset, tokenizer, s.max_new_tokens)
    return References(
        s.reference_share, prompts, request, ranks, prompts_per_step=s.prompts_per_step, steps=s.max_steps
    )


def _tell_of_answers(dataset: PromptSource, tokenizer: Tokenizer, limit: int) -> None:
    """Say how many of the first reference answers no student can learn as they are written, and why."""
    checked = range(min(len(dataset), _ANSWERS_CHECKED))
    texts, tokens = [str(dataset[i][1]) for i in checked], [dataset.answer_tokens(i) for i in checked]
    counts = {
        f"longer than max_new_tokens = {limit}, so they are cut": sum(len(own) > limit for own in tokens),
        "empty, so that they teach to say nothing": sum(not text.strip() for text in texts),
        "written with characters that the tokenizer does not know": sum(
            bool(missing(text, tokenizer.decode(list(own)))) for text, own in zip(texts, tokens, strict=True)
        ),
    }
    if found := [f"{count} are {what}" for what, count in counts.items() if count]:
        print(f"reference_share: of the first {len(checked)} reference answers, {'; '.join(found)}")


def _unanswered(dataset: PromptSource) -> str:
    """How many prompts have no reference answer, as far as it is known."""
    count = _counts(dataset).get("unanswered")
    return f"{count} of {len(dataset)} prompts" if count else "some prompts"


def _counts(dataset: PromptSource) -> Mapping[str, int]:
    """What the summary says of a data set's prompts; one of the user's may not tell why it dropped some."""
    return getattr(dataset, "counts", {"used": len(dataset), "dropped": dataset.dropped})


def _dropped(dataset: PromptSource, limit: int) -> str:
    """How many prompts were dropped, and why."""
    total, counts = dataset.dropped + len(dataset), _counts(dataset)
    each = f"{counts['empty']} empty, {counts['too_long']} longer" if "empty" in counts else "empty or longer"
    return f"{dataset.dropped} of {total} prompts are dropped: {each} than {limit} tokens"


def _check_lengths(
    s: OPRDSettings,
    pairs: ModelPairs,
    accuracy: TaskAccuracy | AccuracyByTeacher | None,
    perplexity: ReferencePerplexity | None,
) -> None:
    """Raise ConfigError if a sequence of the run does not fit into the models' context."""
    lengths = {"max_prompt_tokens + max_new_tokens": s.max_prompt_tokens + s.max_new_tokens}
    if accuracy is not None:
        longest = s.max_prompt_tokens + accuracy.request.max_new_tokens
        lengths["max_prompt_tokens + task_accuracy.max_new_tokens"] = longest
    if perplexity is not None:
        lengths["the longest reference answer with its prompt"] = perplexity.longest
    for what, length in lengths.items():
        if length > pairs.context:
            raise ConfigError(f"{what} = {length} exceeds the models' context of {pairs.context}; lower it")
