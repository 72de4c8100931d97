"""The frozen model that grades every token."""

from oprd_tune.teacher.load import check_teacher, load_teacher
from oprd_tune.teacher.targets import FrozenTeacher

__all__ = ["FrozenTeacher", "check_teacher", "load_teacher"]
