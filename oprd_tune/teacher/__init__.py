"""The frozen model that grades every token."""

from oprd_tune.teacher.targets import FrozenTeacher

__all__ = ["FrozenTeacher"]
