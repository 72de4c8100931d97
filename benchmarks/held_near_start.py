"""Full reverse KL with a bridge's penalty whose targets are the student's own first states instead of the teacher's.

The projector, scale and weight are those of `tiny/bridge_plus_opd`, but nothing of the teacher is in it: it only holds
the student near where it started. What is left of a bridge's gain here is stability; what is missing was transmitted.

    python benchmarks/held_near_start.py --config configs/tiny/bridge_plus_opd.yaml output_dir=outputs/held
"""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from torchtune import config

from oprd_tune.preflight import load_pairs
from oprd_tune.run import load_recipe
from oprd_tune.teacher import FrozenTeacher
from oprd_tune.teacher.loading import load_teacher
from oprd_tune.types import LayerPair, TeacherTargets


class HeldNearStart:
    """A teacher whose hidden states are those of the student as it was, and whose final states are its own.

    Args:
        recipe: set up. Its student is read once more, as it was before training.
    """

    def __init__(self, recipe: Any) -> None:
        own_layers = [LayerPair(pair.student, pair.student) for pair in recipe.teachers[0].pairs]
        parts, s = recipe.run.parts, recipe.settings
        files = load_pairs(parts, s, hidden_loss=True, token_loss=True).student_files
        start, _ = load_teacher(parts.model, files, dtype=s.torch_dtype, device=recipe.ranks.device)
        self._start = FrozenTeacher(start, own_layers)
        self._teacher, self._bridge = recipe.teachers[0].teacher, recipe.teachers[0].bridge

    def targets(self, tokens_BS: Tensor, index_T: Tensor, final_index_T: Tensor | None = None) -> TeacherTargets:
        """See `oprd_tune.protocols.Teacher`."""
        final_TC = self._teacher.targets(tokens_BS, index_T, final_index_T).final_TC
        own = self._start.targets(tokens_BS, index_T).states
        projected = {layer: self._bridge.student(layer, state_TD) for layer, state_TD in own.items()}
        return TeacherTargets(projected, final_TC)


@config.parse
def main(cfg: DictConfig) -> int:
    """Run the recipe with another teacher."""
    recipe: Any = load_recipe("opd_topk_distributed")(cfg)
    recipe.setup()
    recipe.teachers[0].teacher = HeldNearStart(recipe)
    return recipe.train()


if __name__ == "__main__":
    sys.exit(main())
