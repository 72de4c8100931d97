"""A model that is evaluated under a name: its folder, its tokenizer, and the benchmarks as it reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from oprd_tune.config import Component, EvalSettings
from oprd_tune.config.components import check_offers
from oprd_tune.data import HuggingFaceTokenizer
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.folders import find_folder
from oprd_tune.modeling.from_folder import can_build, decoder
from oprd_tune.modeling.weights import build_on_meta, check_weights, hugging_face_checkpointer, load_decoder
from oprd_tune.protocols import Policy, PromptSource, Tokenizer
from oprd_tune.ranks import Ranks
from oprd_tune.teacher import transformers_files, transformers_teacher
from oprd_tune.teacher.block_placement import Placing
from oprd_tune.types import Prompts, SamplingRequest


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate. No weights are read before `load`.

    Attributes:
        name: its name in the evaluation.
        folder: its model folder.
        tokenizer: the folder's own.
        benchmarks: the problems of each benchmark, in its tokens.
        request: what it is asked to sample.
    """

    name: str
    folder: Path
    tokenizer: Tokenizer
    benchmarks: Mapping[str, PromptSource]
    request: SamplingRequest

    @classmethod
    def open(cls, name: str, where: str, benchmarks: Mapping[str, Component], settings: EvalSettings) -> Candidate:
        """Find a model, read its tokenizer and the benchmarks, and check that all fits.

        Args:
            where: the model's folder, or its name on the hub.

        Raises:
            ConfigError: if the model cannot be found, a benchmark has no answers, or a problem with its longest answer
                exceeds the model's context.
        """
        folder = find_folder(f"models.{name}", where)
        tokenizer: Any = HuggingFaceTokenizer(str(folder))
        found: dict[str, PromptSource] = {key: component(tokenizer) for key, component in benchmarks.items()}
        for key, benchmark in found.items():
            check_offers(f"benchmarks.{key}", benchmark, PromptSource)
            if not benchmark.has_answers:
                raise ConfigError(f"benchmarks.{key} has no reference answers; give answer_column")
        longest = max(len(benchmark[i][0]) for benchmark in found.values() for i in range(len(benchmark)))
        model = build_on_meta(_builder(folder))
        largest = max(benchmark.largest_token for benchmark in found.values())
        if largest >= model.tok_embeddings.num_embeddings:
            raise ConfigError(
                f"models.{name}: its tokenizer gives the id {largest}, but the model has "
                f"{model.tok_embeddings.num_embeddings} tokens; the tokenizer in {folder} is another model's"
            )
        context = model.max_seq_len
        if longest + settings.max_new_tokens > context:
            raise ConfigError(
                f"models.{name}: the longest problem has {longest} tokens, and max_new_tokens is "
                f"{settings.max_new_tokens}; together they exceed the context of {context}. Lower max_new_tokens"
            )
        request = SamplingRequest(
            stop_tokens=tokenizer.stop_tokens,
            pad_id=tokenizer.pad_id,
            max_prompt_tokens=longest,
            max_new_tokens=settings.max_new_tokens,
            samples_per_prompt=settings.samples_per_problem,
            seed=settings.seed,
        )
        return cls(name, folder, tokenizer, found, request)

    def load(self, settings: EvalSettings, ranks: Ranks, scratch: Path) -> Policy:
        """Load the weights, in the form that rollout engines take. `scratch` is a folder for the engine's files."""
        where: dict[str, Any] = {"dtype": settings.torch_dtype}
        if can_build(self.folder):
            files = hugging_face_checkpointer(str(self.folder), str(scratch))
            build = partial(decoder, str(self.folder))
            check_weights(f"models.{self.name}", files, build_on_meta(build))
            model = load_decoder(build, files, device=ranks.device, **where)
        else:
            files = transformers_files(str(self.folder), str(scratch))
            files.check_weights(f"models.{self.name}", transformers_teacher(str(self.folder)))
            model, _ = files.load_teacher(top=None, placing=Placing(ranks.device, None, False, None, ()), **where)
        vocabulary = model.tok_embeddings.num_embeddings
        return Policy(
            model.requires_grad_(False).eval(),
            files,
            settings.torch_dtype,
            vocabulary,
            Ranks(device=ranks.device),
            scratch,
        )

    def prompts(self, benchmark: str, problems: list[int]) -> Prompts:
        """Some problems of a benchmark, as an engine takes them. Noise depends on the problem alone."""
        rows = [self.benchmarks[benchmark][i] for i in problems]
        return Prompts(tuple(tokens for tokens, _ in rows), tuple(problems), tuple(answer for _, answer in rows))


def _builder(folder: Path) -> Any:
    return partial(decoder, str(folder)) if can_build(folder) else partial(transformers_teacher, str(folder))
