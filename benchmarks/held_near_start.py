"""Full reverse KL with a bridge's penalty whose targets are the student's own first states instead of the teacher's.

The projector, scale and weight are those of `tiny/bridge_plus_opd`, but nothing of the teacher is in it: it only holds
the student near where it started. What is left of a bridge's gain here is stability; what is missing was transmitted.

    python benchmarks/held_near_start.py --config configs/tiny/bridge_plus_opd.yaml output_dir=outputs/held
"""

from __future__ import annotations

import importlib.util
import sys
from copy import deepcopy

from omegaconf import DictConfig
from torch import Tensor
from torchtune import config

from oprd_tune.registry import recipe_files
from oprd_tune.run.launch import run_recipe
from oprd_tune.teacher import FrozenTeacher
from oprd_tune.types import LayerPair, TeacherTargets

_spec = importlib.util.spec_from_file_location("opd", recipe_files()["opd_topk_single_device"])
_recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_recipe)


class HeldNearStart(_recipe.OPDRecipe):
    """The recipe, with other targets for the hidden-state part."""

    def setup(self) -> bool:
        """As the recipe's; the student's first weights are kept."""
        if not super().setup():
            return False
        layers = [LayerPair(pair.student, pair.student) for pair in self._pairs]
        start, bridge = FrozenTeacher(deepcopy(self._model), layers), self._teacher.bridge
        teacher_targets = self._teacher.targets

        def targets(tokens_BS: Tensor, index_T: Tensor, final_index_T: Tensor) -> TeacherTargets:
            final_TC = teacher_targets(tokens_BS, index_T, final_index_T).final_TC
            own = start.targets(tokens_BS, index_T).states
            return TeacherTargets({layer: bridge.student(layer, state_TD) for layer, state_TD in own.items()}, final_TC)

        self._teacher.targets = targets
        return True


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """Full reverse KL, held near the start."""
    return run_recipe(HeldNearStart, cfg)


if __name__ == "__main__":
    sys.exit(recipe_main())
