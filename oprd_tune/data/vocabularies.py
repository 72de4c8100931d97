"""Compares the tokens of two model folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from oprd_tune.data.tokenizer_files import TOKENIZER, tokens_by_id
from oprd_tune.errors import ConfigError

_SHOWN = 3  # ids listed in a message
_Tokens = tuple[dict[int, str], set[int]]  # a folder's tokens by id, and its special ids


def share_tokens(student: Path, teacher: Path) -> bool:
    """Whether two model folders have the same ordinary tokens under the same ids. Added tokens may differ.

    Raises:
        ConfigError: if a folder has no tokenizer to compare.
    """
    of_student, of_teacher = tokens_by_id(student), tokens_by_id(teacher)
    if of_student is None or of_teacher is None:
        raise ConfigError(
            f"{student if of_student is None else teacher} has no {TOKENIZER}, so nobody can tell whether student and "
            "teacher read texts in the same tokens. If they do, give `tokenizer: FOLDER`, the folder of the tokenizer "
            "of both; if not, complete the folder"
        )
    own, others = (tokens.keys() - added for tokens, added in (of_student, of_teacher))
    return own == others and not _different(of_student, of_teacher)[0]


def check_same_tokens(student_folder: Path, teacher_folder: Path) -> None:
    """Compare the tokenizers of two model folders. Embedding rows beyond the tokens are padding and do not matter.

    Three findings are printed: special tokens with different names; tokens that only the student has, which the teacher
    reads through untrained rows; and a folder without `tokenizer.json`, which cannot be compared.

    Raises:
        ConfigError: if an id stands for two different ordinary tokens.
    """
    of_student, of_teacher = tokens_by_id(student_folder), tokens_by_id(teacher_folder)
    if of_student is None or of_teacher is None:
        missing = student_folder if of_student is None else teacher_folder
        print(f"{missing} has no tokenizer.json: whether student and teacher share their tokens is not checked.")
        return
    (student, _), (teacher, _) = of_student, of_teacher
    shared = student.keys() & teacher.keys()
    ordinary, renamed = _different(of_student, of_teacher)

    def examples(ids: Sequence[int]) -> str:
        return "; ".join(f"{i} is {student[i]!r} and {teacher.get(i)!r}" for i in ids[:_SHOWN])

    if ordinary:
        raise ConfigError(
            f"student and teacher do not share their tokens: {len(ordinary)} of {len(shared)} ids differ, for example "
            f"{examples(ordinary)}. The teacher reads the student's ids, so both need one vocabulary; padded sizes may "
            "differ"
        )
    if renamed:
        print(f"{len(renamed)} special tokens differ between student and teacher: {examples(renamed)}.")
    if own := sorted(student.keys() - teacher.keys()):
        print(f"{len(own)} tokens are the student's alone: {examples(own)}.")


def _different(of_student: _Tokens, of_teacher: _Tokens) -> tuple[list[int], list[int]]:
    """The ids that stand for different ordinary tokens, and those that stand for different special tokens."""
    (student, student_special), (teacher, teacher_special) = of_student, of_teacher
    different = sorted(i for i in student.keys() & teacher.keys() if student[i] != teacher[i])
    special = student_special & teacher_special
    return [i for i in different if i not in special], [i for i in different if i in special]
