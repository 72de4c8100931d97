"""The frozen model that the student learns from."""

from oprd_tune.teacher.frozen import FrozenTeacher
from oprd_tune.teacher.loading import TeacherPlan, load_teacher

__all__ = ["FrozenTeacher", "TeacherPlan", "load_teacher"]
