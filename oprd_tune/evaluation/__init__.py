"""Measures of how good a model is at its task."""

from oprd_tune.evaluation.by_teacher import AccuracyByTeacher
from oprd_tune.evaluation.perplexity import ReferencePerplexity
from oprd_tune.evaluation.task_accuracy import TaskAccuracy

__all__ = ["AccuracyByTeacher", "ReferencePerplexity", "TaskAccuracy"]
