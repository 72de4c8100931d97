"""The model that the student learns from."""

from oprd_tune.teacher.frozen import FrozenTeacher
from oprd_tune.teacher.loading import TeacherPlan, load_teacher
from oprd_tune.teacher.transformers_files import transformers_files, transformers_teacher

__all__ = ["FrozenTeacher", "TeacherPlan", "load_teacher", "transformers_files", "transformers_teacher"]
