"""The student and its optimizer: how it is built, how gradients are combined, how a step is taken."""

from oprd_tune.training.schedules import constant_with_warmup, cosine_with_warmup

__all__ = ["constant_with_warmup", "cosine_with_warmup"]
