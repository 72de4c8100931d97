"""Data sets of mathematics by name: where they are, and which of their columns hold prompts and reference answers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from oprd_tune.data.chats import Prompt
from oprd_tune.errors import ConfigError, nearest

INSTRUCTIONS = {"boxed": "Please reason step by step, and put your final answer within \\boxed{}.", "none": ""}


@dataclass(frozen=True)
class Benchmark:
    """Where a data set is, and how its rows are read.

    Attributes:
        source: the hub name, or a path to a local file.
        split: the split that is usual.
        prompt_column: the column with the prompts; None finds one by its name.
        answer_column: the column with the reference answers; None if they are not needed.
        subset: the configuration of the hub's data set.
        revision: the commit of the hub's data set. None takes its newest.
        instruction: what is added to each prompt: a name in `INSTRUCTIONS`, or a text.
        answers_in_list: whether an answer may be a list of texts. Several are joined by commas.
    """

    source: str
    split: str = "train"
    prompt_column: str | None = None
    answer_column: str | None = None
    subset: str | None = None
    revision: str | None = None
    instruction: str = "none"
    answers_in_list: bool = False


def _named(source: str, split: str, prompt: str, answer: str, **more: Any) -> Benchmark:
    return Benchmark(source, split, prompt, answer, instruction="boxed", **more)


# Each entry was compared with public documents, not with the hub itself: dataset cards, listings of files, and programs
# of several authors that read the data set at this commit. What no such document shows is said at the entry.
_GSM8K = {"subset": "main", "revision": "740312add88f781978c0658806c59bc2815b9866"}
BENCHMARKS = {
    # 30 problems. The column `solution` holds the answer, such as \boxed{204}.
    "aime24": _named(
        "math-ai/aime24", "test", "problem", "solution", revision="83a7f387baaa524a8bda0022eac0541582297103"
    ),
    # 30 problems.
    "aime25": _named(
        "math-ai/aime25", "test", "problem", "answer", revision="563bb8404243c5f09de6ec262f2db674fe5bce9b"
    ),
    # 90 problems: AIME 2022, 2023 and 2024. The last 30 are those of `aime24`.
    "aimo": _named(
        "AI-MO/aimo-validation-aime", "train", "problem", "answer", revision="13f9e12f613e720c2a2b2f345dd04b998a29494d"
    ),
    # 40 problems of the AMC 12, changed so that a number is the answer.
    "amc23": _named("math-ai/amc23", "test", "question", "answer", revision="80815d37005feb82cd7f8fbc6901d5d3eff43057"),
    # 500 problems.
    "math500": _named(
        "HuggingFaceH4/MATH-500", "test", "problem", "answer", revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"
    ),
    # 1,319 problems. The answer follows `####`.
    "gsm8k": _named("openai/gsm8k", "test", "question", "answer", **_GSM8K),
    # 272 problems.
    "minerva": _named(
        "math-ai/minervamath", "test", "question", "answer", revision="ee46ddc498933b1977577953250ca5c66be64f96"
    ),
    # 674 problems: competition mathematics in English, without images, with an answer to compare.
    "olympiad": _named(
        "Hothan/OlympiadBench",
        "train",
        "question",
        "final_answer",
        subset="OE_TO_maths_en_COMP",
        revision="91184b52131e7fc9455fef848035173aea8cc01a",
        answers_in_list=True,
    ),
    # 14,116 problems of BytedTsinghua-SIA/DAPO-Math-17k, each once. We found no document with a whole commit, and none
    # that proves that no prompt keeps the old instruction.
    "dapo_math_17k": _named("open-r1/DAPO-Math-17k-Processed", "train", "prompt", "solution", subset="en"),
    # 103,022 problems; older commits have 103,110.
    "deepmath": _named(
        "zwhe99/DeepMath-103K", "train", "question", "final_answer", revision="5cf055d1fe3d7a2eb19719ac020211469736ae44"
    ),
    # 7,473 problems.
    "gsm8k_train": _named("openai/gsm8k", "train", "question", "answer", **_GSM8K),
}
# What verl's preparation of a data set writes, whichever it is.
_VERL = ("prompt", "reward_model.ground_truth")


def find_benchmark(benchmark: str | None, source: str | None, path: str | None, **given: Any) -> Benchmark:
    """What a config says about its prompts: a data set by name, changed where the config says otherwise, or its own.

    Args:
        benchmark: a name in `BENCHMARKS`, or None.
        source: a hub name or a file; not beside `benchmark`.
        path: a local file with the rows of `benchmark`.
        given: further fields of `Benchmark`; those that are None do not count.

    Raises:
        ConfigError: if the name is not known, or if arguments contradict each other.
    """
    own = {key: value for key, value in given.items() if value is not None}
    if benchmark is None:
        if path is not None:
            raise ConfigError(
                f"dataset.path {path!r} is a file with the rows of dataset.benchmark; give source instead"
            )
        if source is None:
            raise ConfigError(
                f"dataset needs a source: a hub name or a file. Or give a benchmark: {', '.join(BENCHMARKS)}"
            )
        return Benchmark(source, **own)
    if source is not None:
        raise ConfigError(
            f"dataset.benchmark {benchmark!r} and dataset.source {source!r} both say where the prompts are; leave one "
            "out. dataset.path names a local file with the rows of the benchmark"
        )
    if benchmark not in BENCHMARKS:
        raise ConfigError(f"dataset.benchmark {benchmark!r} is not known{nearest(str(benchmark), BENCHMARKS)}")
    found = BENCHMARKS[benchmark]
    if path is not None:
        if only_hub := sorted({"subset", "revision"} & own.keys()):
            raise ConfigError(
                f"dataset.{only_hub[0]} is for the hub, but dataset.path is a file; leave one of them out"
            )
        found = replace(found, source=path, split="train", subset=None, revision=None)
    return replace(found, **own)


def fit_to_columns(benchmark: Benchmark, columns: Collection[str], **given: Any) -> Benchmark:
    """A benchmark for a local file with these columns: in the hub's own layout, or in the one that verl writes.

    verl's prompts are chat messages that hold an instruction already, so none is added unless the config has one.

    Args:
        benchmark: as `find_benchmark` gives it.
        columns: the names of the file's columns.
        given: what the config says about `prompt_column`, `answer_column` and `instruction`.
    """
    has_own = {benchmark.prompt_column, benchmark.answer_column} <= set(columns)
    is_verl = {name.split(".")[0] for name in _VERL} <= set(columns)
    says_columns = given.get("prompt_column") is not None or given.get("answer_column") is not None
    if has_own or says_columns or not is_verl:
        return benchmark
    instruction = given.get("instruction") or "none"
    return replace(benchmark, prompt_column=_VERL[0], answer_column=_VERL[1], instruction=instruction)


def instruction_text(instruction: str) -> str:
    """The text of an instruction: that of a name in `INSTRUCTIONS`, or the text itself.

    Raises:
        ConfigError: if a single word is no such name.
    """
    if instruction in INSTRUCTIONS:
        return INSTRUCTIONS[instruction]
    if len(str(instruction).split()) < 2:
        raise ConfigError(
            f"dataset.instruction is {instruction!r}; give {', '.join(INSTRUCTIONS)}, or a text of several words"
        )
    return instruction


def with_instruction(prompt: Prompt, instruction: str, where: str) -> Prompt:
    """A prompt whose last message of the user's ends with an instruction, after an empty line.

    A prompt that holds the instruction already stays as it is, and so does an empty one.

    Args:
        prompt: a text, or chat messages.
        instruction: the text; an empty one adds nothing.
        where: the place of the prompt, for errors.

    Raises:
        ConfigError: if no message is the user's.
    """
    if not prompt or not instruction:
        return prompt
    if isinstance(prompt, str):
        return prompt if instruction in prompt else f"{prompt}\n\n{instruction}"
    if any(instruction in message["content"] for message in prompt):
        return prompt
    place = next((i for i in reversed(range(len(prompt))) if prompt[i]["role"] == "user"), None)
    if place is None:
        raise ConfigError(f"{where} has no message of the user's, which dataset.instruction could be added to")
    changed = {**prompt[place], "content": f"{prompt[place]['content']}\n\n{instruction}"}
    return [*prompt[:place], changed, *prompt[place + 1 :]]


def joined(answer: Any) -> Any:
    """Reference answers that come as a list of texts, as one text; anything else as it is."""
    if isinstance(answer, list | tuple) and all(isinstance(part, str) for part in answer):
        return ", ".join(answer) or None
    return answer
