"""Student and teacher: checked against each other, their files and the data, before any weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torchtune.modules import TransformerDecoder
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.config import ONLY_TEACHER, Component, OPRDSettings, Parts, construct
from oprd_tune.data.tokenizer import HuggingFaceTokenizer
from oprd_tune.data.vocabularies import check_same_tokens
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.adapters import adapter_names, check_adapters
from oprd_tune.modeling.bridge import BridgePlan
from oprd_tune.modeling.heads import LMHead, why_no_matrix
from oprd_tune.modeling.layer_map import check_widths, pair_layers
from oprd_tune.modeling.weights import build_on_meta, check_weights, open_checkpointer, width_of
from oprd_tune.protocols import DecodesItself, PromptSource, TeacherFiles, Tokenizer
from oprd_tune.teacher.self_teaching import check_teacher_weights, tell_of_live_states
from oprd_tune.torchtune_compat import folder_of
from oprd_tune.types import LayerPair


@dataclass(frozen=True)
class ModelPair:
    """A student and one of its teachers, which fit together.

    Attributes:
        name: the teacher's name.
        parts, settings: the config as if this teacher were the only one.
        bridge: how its bridge is made; None without one.
        layers: the paired layers, ascending by student layer; empty without a hidden-state loss.
        depth, teacher_depth: the number of blocks.
        student_files, teacher_files: the opened checkpointers.
        width, teacher_width: the size of a hidden state.
        context: the number of tokens that both models can read. If the teacher has another tokenizer, the number that
            the student can read.
        teacher_context: the number of tokens that the teacher can read.
        vocabulary: the number of token ids that both models know: the smaller of two padded sizes. If the teacher has
            another tokenizer, the number that the student knows.
        teacher_vocabulary: the number of token ids that the teacher knows.
        compares_heads: whether token losses read both LM heads.
        diagnosed: whether next-token distributions are compared now and then where no loss does it.
    """

    name: str
    parts: Parts
    settings: OPRDSettings
    bridge: BridgePlan | None
    layers: list[LayerPair]
    depth: int
    teacher_depth: int
    student_files: FullModelHFCheckpointer
    teacher_files: FullModelHFCheckpointer
    width: int
    teacher_width: int
    context: int
    teacher_context: int
    vocabulary: int
    teacher_vocabulary: int
    compares_heads: bool
    diagnosed: bool

    @property
    def teacher_top(self) -> int | None:
        """The highest teacher layer that is read; None for the whole teacher."""
        if self.compares_heads or self.diagnosed or (self.bridge is not None and self.bridge.needs_final_state):
            return None
        return max(pair.teacher for pair in self.layers)

    @property
    def bridge_sizes(self) -> tuple[int, int, int]:
        """The number of paired layers, and the widths of student and teacher."""
        return len(self.layers), self.width, self.teacher_width

    def check_teacher_tokens(self, tokenizer: HuggingFaceTokenizer, dataset: PromptSource) -> None:
        """Raise ConfigError if the teacher lacks an id of its own tokenizer, or cannot read the longest prompt."""
        largest = len(tokenizer.token_bytes.pieces) - 1
        if largest >= self.teacher_vocabulary:
            raise ConfigError(
                f"teacher_tokenizer has an id {largest}, but the teacher's vocabulary ends at "
                f"{self.teacher_vocabulary - 1}; give the teacher's own tokenizer"
            )
        if (longest := dataset.longest_teacher_prompt or 0) >= self.teacher_context:
            raise ConfigError(
                f"the longest prompt has {longest} of the teacher's tokens, its context {self.teacher_context}; lower "
                "max_prompt_tokens"
            )


class ModelPairs(list[ModelPair]):
    """The student with each of its teachers, in the order of the config."""

    @property
    def student_files(self) -> FullModelHFCheckpointer:
        """The student's opened checkpointer."""
        return self[0].student_files

    @property
    def top(self) -> int:
        """The highest student layer that a loss on hidden states reads."""
        return self[0].layers[-1].student

    @property
    def depth(self) -> int:
        """The number of the student's blocks."""
        return self[0].depth

    @property
    def vocabulary(self) -> int:
        """The number of token ids that all models know which read the student's tokens."""
        return min(pair.vocabulary for pair in self)

    @property
    def context(self) -> int:
        """The number of tokens that these models can read."""
        return min(pair.context for pair in self)

    def check_tokens(self, tokenizer: Tokenizer, datasets: Sequence[PromptSource]) -> None:
        """Raise ConfigError if the tokenizer or the data has a token id that a model has no embedding for."""
        used = [tokenizer.pad_id, *tokenizer.stop_tokens, *(dataset.largest_token for dataset in datasets)]
        if max(used) >= self.vocabulary:
            raise ConfigError(
                f"the tokenizer uses id {max(used)}, but the models' vocabulary ends at {self.vocabulary - 1}; give "
                "the models' own tokenizer"
            )

    def check_answers(self, name: str, dataset: PromptSource, *, most: int | None = None) -> None:
        """Raise ConfigError if a reference answer has a token that a model does not know, nor can say.

        Args:
            name: the data set's config key.
            most: how many answers to read; None reads all.
        """
        for i in range(len(dataset))[:most]:
            if (largest := max(dataset.answer_tokens(i))) >= self.vocabulary:
                raise ConfigError(
                    f"{name}: the reference answer {dataset[i][1]!r} has the token {largest}, but the models' "
                    f"vocabulary ends at {self.vocabulary - 1}, so no response could be it; take such rows out, or "
                    "give the models' own tokenizer"
                )


@contextmanager
def of_teacher(name: str) -> Iterator[None]:
    """Within the scope, a ConfigError also says which of several teachers it is about."""
    try:
        yield
    except ConfigError as error:
        if name == ONLY_TEACHER:
            raise
        raise ConfigError(f"teachers.{name}: {error}") from error


def whose(name: str) -> str:
    """`the teacher's`, with its name among several."""
    return "the teacher's" if name == ONLY_TEACHER else f"the teacher {name}'s"


def load_pairs(
    parts: Parts,
    settings: OPRDSettings,
    *,
    hidden_loss: bool = True,
    token_loss: bool = False,
    compares_tokens: bool = True,
) -> ModelPairs:
    """Build all models without weights, and check that they fit each other, the losses and their checkpoint files.

    Args:
        hidden_loss: whether a loss reads hidden states. If none does, widths and depths may differ.
        token_loss: whether a loss reads the student's LM head.
        compares_tokens: whether such a loss reads the teacher's too, which then needs the student's tokens.

    Raises:
        ConfigError: if the models, the losses or the files do not fit.
    """
    pairs, losses = ModelPairs(), {"hidden_loss": hidden_loss, "token_loss": token_loss}
    for name, (own_parts, own_settings) in parts.of_each_teacher(settings).items():
        with of_teacher(name):
            pairs.append(_load_pair(name, own_parts, own_settings, **losses, compares_tokens=compares_tokens))
    if len([pair for pair in pairs if pair.settings.teacher_decay is not None]) > 1:
        raise ConfigError("teachers has more than one with teacher_weights `ema`; there may be one")
    for pair in pairs:
        first, own = ([layer.student for layer in each.layers] for each in (pairs[0], pair))
        if own != first:
            raise ConfigError(
                f"teachers.{pair.name} is paired with the student's layers {own}, and teachers.{pairs[0].name} with "
                f"{first}; give layer_pairs with the same layers of the student"
            )
    return pairs


def _load_pair(
    name: str, parts: Parts, settings: OPRDSettings, *, hidden_loss: bool, token_loss: bool, compares_tokens: bool
) -> ModelPair:
    own_tokens = parts.teacher_tokenizer is not None
    compares_heads = token_loss and compares_tokens
    if compares_heads and own_tokens:
        raise ConfigError(
            "student and teacher read texts in different tokens (teacher_tokenizer), but token losses compare them "
            "token by token. Take a teacher with the student's tokens, or compare hidden states alone; beside them, "
            "ReferenceCrossEntropy and TaskReward read no teacher"
        )
    student_files = _opened(parts.checkpointer, settings.output_dir)
    teacher_files = _opened(parts.teacher_checkpointer, settings.output_dir)
    student, teacher = _built(parts.model), _built(parts.teacher_model)
    _check_each(parts, settings, student, teacher)
    tell_of_live_states(settings, compares_heads=compares_heads)
    pairs: list[LayerPair] = []
    if hidden_loss:
        if parts.bridge is None:
            check_widths(width_of(student), width_of(teacher))
        depths = {"student_depth": len(student.layers), "teacher_depth": len(teacher.layers)}
        pairs = pair_layers(settings.layers, settings.layer_pairs, **depths, bridged=parts.bridge is not None)
    if token_loss:
        LMHead(student, "model")
    if compares_heads:
        LMHead(teacher, "teacher_model")
    if not own_tokens:
        check_same_tokens(folder_of(student_files), folder_of(teacher_files))
    check_weights("checkpointer", student_files, student)
    check_weights("teacher_checkpointer", teacher_files, teacher)
    read_same = [student] if own_tokens else [student, teacher]
    vocabulary = min(model.tok_embeddings.num_embeddings for model in read_same)
    if settings.diagnostics_every_n_steps is not None and not own_tokens and settings.diagnostics_k > vocabulary:
        raise ConfigError(
            f"diagnostics_k is {settings.diagnostics_k}, but the models share {vocabulary} tokens; lower it"
        )
    return ModelPair(
        name=name,
        parts=parts,
        settings=settings,
        bridge=construct(parts.bridge),
        layers=pairs,
        depth=len(student.layers),
        teacher_depth=len(teacher.layers),
        student_files=student_files,
        teacher_files=teacher_files,
        width=width_of(student),
        teacher_width=width_of(teacher),
        context=min(model.max_seq_len for model in read_same),
        teacher_context=teacher.max_seq_len,
        vocabulary=vocabulary,
        teacher_vocabulary=teacher.tok_embeddings.num_embeddings,
        compares_heads=compares_heads,
        diagnosed=not compares_heads and _diagnosed(name, settings, student, teacher, own_tokens=own_tokens),
    )


def _check_each(parts: Parts, s: OPRDSettings, student: TransformerDecoder, teacher: TransformerDecoder) -> None:
    """Raise ConfigError if the student cannot train as the settings say, or the teacher cannot teach so."""
    check_adapters("model", student)
    if s.activation_checkpointing > len(student.layers):
        raise ConfigError(
            f"activation_checkpointing is {s.activation_checkpointing}, but the student has "
            f"{len(student.layers)} blocks, so none would be recomputed; give true, or a smaller number"
        )
    check_teacher_weights(parts, s, adapted=bool(adapter_names(student)))
    if adapter_names(teacher) and not s.teacher_is_student:
        raise ConfigError("teacher_model has adapters; merge them into its weights, and give the plain builder")


def _opened(component: Component, output_dir: str) -> FullModelHFCheckpointer:
    """An opened checkpointer. Raises ConfigError if the component gives anything else."""
    files = open_checkpointer(component, output_dir)
    if not isinstance(files, (FullModelHFCheckpointer, TeacherFiles)):
        raise ConfigError(
            f"{component.name}: {component.path} gives a {type(files).__name__}; it must give torchtune's "
            "FullModelHFCheckpointer"
        )
    return files


def _built(build: Component) -> TransformerDecoder:
    """A model on the meta device. Raises ConfigError if the component builds anything else."""
    model = build_on_meta(build)
    if not isinstance(model, (TransformerDecoder, DecodesItself)):
        raise ConfigError(
            f"{build.name}: {build.path} gives a {type(model).__name__}; it must give torchtune's TransformerDecoder"
        )
    return model


def _diagnosed(
    name: str, settings: OPRDSettings, student: TransformerDecoder, teacher: TransformerDecoder, *, own_tokens: bool
) -> bool:
    """Whether to compare next-token distributions now and then. If that is wished but impossible, say why."""
    if settings.diagnostics_every_n_steps is None:
        return False
    heads = (("the student's", student), (whose(name), teacher))
    obstacles = [f"{whose} {what}" for whose, model in heads if (what := why_no_matrix(model)) is not None]
    if own_tokens:
        obstacles.append(f"{whose(name)} tokens are others")
    if obstacles:
        print(f"No diagnostics of next tokens, since {' and '.join(obstacles)}.")
    return not obstacles
