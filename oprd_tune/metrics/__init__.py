"""The metrics of a run, and where they are logged."""

from oprd_tune.metrics.step import Metrics, StepResult
from oprd_tune.metrics.tensorboard import TensorBoardLogger

__all__ = ["Metrics", "StepResult", "TensorBoardLogger"]
