"""Everything around the steps of a run: processes, loop, checkpoints, exports and journal."""

from oprd_tune.run.launcher import launch, load_recipe
from oprd_tune.run.process import join_run
from oprd_tune.run.run import Run

__all__ = ["Run", "join_run", "launch", "load_recipe"]
