"""Student and teacher, checked against each other, their files and the data, before any weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torchtune.training import FullModelHFCheckpointer

from oprd_tune.data.prompts import PromptDataset
from oprd_tune.data.tokenizer import HuggingFaceTokenizer
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.layer_map import check_widths, pair_layers
from oprd_tune.modeling.load import Builder, build_on_meta, check_weights, open_checkpointer, width_of
from oprd_tune.types import LayerPair


@dataclass(frozen=True)
class ModelPair:
    """Two models that fit together.

    Attributes:
        layers: the paired layers, ascending by student layer.
        student_files: the student's opened checkpointer.
        teacher_files: the teacher's.
        context: tokens that both models can read.
        vocabulary: token ids that both models know.
    """

    layers: list[LayerPair]
    student_files: FullModelHFCheckpointer
    teacher_files: FullModelHFCheckpointer
    context: int
    vocabulary: int

    def check_lengths(self, lengths: Mapping[str, int]) -> None:
        """Raise ConfigError for a length, given by what it consists of, that exceeds the context."""
        for what, length in lengths.items():
            if length > self.context:
                raise ConfigError(f"{what} = {length} exceeds the models' context of {self.context}; lower it")

    def check_tokens(self, tokenizer: HuggingFaceTokenizer, datasets: Sequence[PromptDataset]) -> None:
        """Raise ConfigError if the tokenizer makes ids that a model has no embedding for."""
        used = [tokenizer.pad_id, *tokenizer.stop_tokens, *(dataset.largest_token for dataset in datasets)]
        if max(used) >= self.vocabulary:
            raise ConfigError(
                f"the tokenizer uses id {max(used)}, but the models' vocabulary ends at {self.vocabulary - 1}; give "
                "the models' own tokenizer"
            )


def check_pair(
    build: Builder,
    build_teacher: Builder,
    open_student: Callable[[], FullModelHFCheckpointer],
    open_teacher: Callable[[], FullModelHFCheckpointer],
    *,
    layers: str | Sequence[int],
    layer_pairs: Sequence[Sequence[int]] | None,
) -> ModelPair:
    """Check that two models fit each other, the chosen layers, and their checkpoint files.

    Args:
        build: builds the student; called on the meta device.
        build_teacher: builds the teacher.
        open_student: constructs the student's checkpointer.
        open_teacher: constructs the teacher's.
        layers: see `pair_layers`.
        layer_pairs: see `pair_layers`.

    Raises:
        ConfigError: if they do not.
    """
    student_files = open_checkpointer("checkpointer", open_student)
    teacher_files = open_checkpointer("teacher_checkpointer", open_teacher)
    student, teacher = build_on_meta(build), build_on_meta(build_teacher)
    check_widths(width_of(student), width_of(teacher))
    pairs = pair_layers(layers, layer_pairs, student_depth=len(student.layers), teacher_depth=len(teacher.layers))
    sizes = [model.tok_embeddings.num_embeddings for model in (student, teacher)]
    if sizes[1] < sizes[0]:
        raise ConfigError(
            f"the teacher embeds {sizes[1]} tokens, fewer than the {sizes[0]} that the student may sample"
        )
    check_weights("checkpointer", student_files, student)
    check_weights("teacher_checkpointer", teacher_files, teacher)
    return ModelPair(
        layers=pairs,
        student_files=student_files,
        teacher_files=teacher_files,
        context=min(student.max_seq_len, teacher.max_seq_len),
        vocabulary=min(sizes),
    )
