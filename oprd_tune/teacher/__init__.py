"""The frozen model that grades every token."""

from oprd_tune.teacher.frozen import FrozenTeacher
from oprd_tune.teacher.loading import TeacherPlan, load_teacher

__all__ = ["FrozenTeacher", "TeacherPlan", "load_teacher"]
