"""What a run measures, and where it writes it."""

from oprd_tune.metrics.step import Metrics, StepResult
from oprd_tune.metrics.tensorboard import TensorBoardLogger

__all__ = ["Metrics", "StepResult", "TensorBoardLogger"]
