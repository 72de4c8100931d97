"""A teacher with its own tokenizer whose states are met one token too late: what alignment is worth.

python benchmarks/misaligned.py --config configs/tiny/cross_tokenizer.yaml output_dir=outputs/misaligned
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from omegaconf import DictConfig
from torchtune import config

from oprd_tune.data import Reader
from oprd_tune.registry import recipe_files
from oprd_tune.run.launch import run_recipe
from oprd_tune.types import Reading, Rollout

_spec = importlib.util.spec_from_file_location("oprd", recipe_files()["oprd_single_device"])
_recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_recipe)


class LateReader:
    """Reads as a `Reader`; each state is then paired with the teacher's next one."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def read(self, rollout: Rollout, teacher_prompts: Sequence[Sequence[int]]) -> Reading:
        """See `Reader.read`."""
        reading = self._reader.read(rollout, teacher_prompts)
        late_BS = torch.minimum(reading.column_BS + 1, reading.lengths_B[:, None] - 1)
        return replace(reading, column_BS=torch.where(reading.column_BS >= 0, late_BS, -1))


class Misaligned(_recipe.OPRDRecipe):
    """The recipe, with a reader that is late."""

    def _load_student(self, pair: object) -> None:
        super()._load_student(pair)
        self._data = replace(self._data, reader=LateReader(self._data.reader))


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """OPRD-Bridge with misaligned states."""
    return run_recipe(Misaligned, cfg)


if __name__ == "__main__":
    sys.exit(recipe_main())
