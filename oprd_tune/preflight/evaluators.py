"""What a run measures its student and its teachers by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oprd_tune.config import Parts, construct
from oprd_tune.config.components import check_offers
from oprd_tune.data import RoutedPrompts
from oprd_tune.errors import ConfigError
from oprd_tune.evaluation import AccuracyByTeacher, ReferencePerplexity, TaskAccuracy
from oprd_tune.evaluation.during_training import BenchmarkEval
from oprd_tune.preflight.pair import ModelPair, ModelPairs
from oprd_tune.protocols import PromptSource, Tokenizer
from oprd_tune.ranks import Ranks


@dataclass(frozen=True)
class Evaluators:
    """Makes the evaluators of a config. `own_tokenizers` holds each teacher's; None if it reads the student's."""

    parts: Parts
    pairs: ModelPairs
    tokenizer: Tokenizer
    own_tokenizers: Mapping[str, Tokenizer | None]
    ranks: Ranks

    def accuracy(self, held_out: PromptSource | None) -> TaskAccuracy | AccuracyByTeacher | None:
        """Measures the student on held-out prompts, by teacher where the data set says who reads a prompt."""
        if not isinstance(held_out, RoutedPrompts) or self.parts.task_accuracy is None:
            return self._accuracy(held_out, self.tokenizer, self.pairs.vocabulary)
        found: dict[str, Any] = {}
        for name, part in held_out.parts.items():
            found[name] = self._accuracy(part, self.tokenizer, self.pairs.vocabulary)
            if missing := [needed for needed in ("grader", "samples", "request") if not hasattr(found[name], needed)]:
                kind = type(found[name]).__name__
                raise ConfigError(f"task_accuracy: {kind} lacks {', '.join(missing)}, which several teachers need")
        return AccuracyByTeacher(found)

    def teacher_accuracy(
        self, pair: ModelPair, held_out: PromptSource | None, students: TaskAccuracy | AccuracyByTeacher | None
    ) -> TaskAccuracy | None:
        """Measures a teacher on the held-out prompts that it reads; None if nothing says which these are."""
        if self.parts.teachers:
            held_out = held_out.parts.get(pair.name) if isinstance(held_out, RoutedPrompts) else None
            students = students.parts.get(pair.name) if isinstance(students, AccuracyByTeacher) else None
        if held_out is None or held_out.longest_teacher_prompt is None:
            return students  # type: ignore[return-value]
        own = self.own_tokenizers[pair.name]
        vocabulary = pair.vocabulary if own is None else pair.teacher_vocabulary
        return self._accuracy(held_out.as_teacher_reads(), own or self.tokenizer, vocabulary)

    def _accuracy(self, held_out: PromptSource | None, tokenizer: Tokenizer, vocabulary: int) -> TaskAccuracy | None:
        found: TaskAccuracy | None = construct(
            self.parts.task_accuracy, held_out, tokenizer, vocabulary=vocabulary, ranks=self.ranks
        )
        if found is not None:
            check_offers("task_accuracy", found, TaskAccuracy)
        return found

    def perplexity(self, held_out: PromptSource | None) -> ReferencePerplexity | None:
        """Measures the student's perplexity on held-out answers."""
        given = {"vocabulary": self.pairs.vocabulary, "ranks": self.ranks}
        found: ReferencePerplexity | None = construct(
            self.parts.reference_perplexity, held_out, self.tokenizer, **given
        )
        if found is not None:
            check_offers("reference_perplexity", found, ReferencePerplexity)
        return found

    def benchmarks(self) -> BenchmarkEval | None:
        """The benchmarks of the section `eval`, for the student."""
        if self.parts.eval is None:
            return None
        if self.parts.eval.teacher and self.parts.teachers:
            raise ConfigError("eval.teacher asks one teacher, and the config has `teachers`; ask them by math_eval")
        found = BenchmarkEval.open(self.parts.eval, self.tokenizer, self.pairs.vocabulary, self.ranks)
        found.problems.check_fit("eval", vocabulary=self.pairs.vocabulary, context=self.pairs.context)
        return found

    def teacher_benchmarks(self, pair: ModelPair, students: BenchmarkEval | None) -> BenchmarkEval | None:
        """The same for a teacher, if it is to answer them too."""
        if self.parts.eval is None or not self.parts.eval.teacher:
            return None
        if (own := self.own_tokenizers[pair.name]) is None:
            return students
        found = BenchmarkEval.open(self.parts.eval, own, pair.teacher_vocabulary, self.ranks)
        sizes = {"vocabulary": pair.teacher_vocabulary, "context": pair.teacher_context}
        found.problems.check_fit("eval, for the teacher", **sizes)
        return found
