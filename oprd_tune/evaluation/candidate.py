"""A model that is evaluated under a name: its folder, its tokenizer, and the benchmarks as it reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from oprd_tune.config import Component, EvalSettings
from oprd_tune.data import HuggingFaceTokenizer
from oprd_tune.errors import ConfigError
from oprd_tune.evaluation.problem_sets import ProblemSets
from oprd_tune.modeling.folders import find_folder
from oprd_tune.modeling.from_folder import can_build, decoder
from oprd_tune.modeling.weights import build_on_meta, check_weights, hugging_face_checkpointer, load_decoder
from oprd_tune.protocols import Policy
from oprd_tune.ranks import Ranks
from oprd_tune.teacher import transformers_files, transformers_teacher
from oprd_tune.teacher.block_placement import Placing


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate. No weights are read before `load`.

    Attributes:
        name: its name in the evaluation.
        folder: its model folder.
        problems: the benchmarks as it reads them, and what it is asked to sample.
    """

    name: str
    folder: Path
    problems: ProblemSets

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
        try:
            tokenizer: Any = HuggingFaceTokenizer(str(folder), chat_template_kwargs=settings.chat_template_kwargs)
        except ConfigError as error:
            raise ConfigError(f"models.{name}: {error}") from error
        problems = ProblemSets.open(
            "benchmarks",
            benchmarks,
            tokenizer,
            max_new_tokens=settings.max_new_tokens,
            samples_per_problem=settings.samples_per_problem,
            seed=settings.seed,
        )
        model = build_on_meta(_builder(folder))
        vocabulary = model.tok_embeddings.num_embeddings
        problems.check_fit(f"models.{name}", vocabulary=vocabulary, context=model.max_seq_len)
        return cls(name, folder, problems)

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


def _builder(folder: Path) -> Any:
    return partial(decoder, str(folder)) if can_build(folder) else partial(transformers_teacher, str(folder))
