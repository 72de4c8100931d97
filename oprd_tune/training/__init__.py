"""The parts of a training run that nobody wants to edit."""

from oprd_tune.training.evaluation import ReferencePerplexity, TaskAccuracy
from oprd_tune.training.optim import constant_with_warmup, cosine_with_warmup

__all__ = ["ReferencePerplexity", "TaskAccuracy", "constant_with_warmup", "cosine_with_warmup"]
