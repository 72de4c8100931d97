"""Is a response right? Graders are functions of the response's text and the reference answer."""

from oprd_tune.grading.graders import exact_match, math_answer

__all__ = ["exact_match", "math_answer"]
