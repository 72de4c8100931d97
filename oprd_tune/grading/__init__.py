"""Graders decide whether a response is right. They are functions of its text and the reference answer."""

from oprd_tune.grading.graders import MathAnswer, exact_match, math_answer

__all__ = ["MathAnswer", "exact_match", "math_answer"]
