"""Runs `oprd_distributed`, times its steps from outside, and writes no checkpoint.

    python benchmarks/timed_steps.py --config configs/tiny/oprd.yaml max_steps=3 output_dir=outputs/timed

The last line that it prints is JSON: the seconds from each step's start to the next one's. What is not in the metrics
`time/…` of a step is logging, and whatever else stands between its phases.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from typing import Any

from omegaconf import DictConfig
from torchtune import config

from oprd_tune.run import load_recipe


@config.parse
def main(cfg: DictConfig) -> int:
    """Run the recipe."""
    make_recipe: Any = load_recipe("oprd_distributed")
    recipe = make_recipe(cfg)
    recipe.setup()
    recipe.run._save = lambda: None  # gigabytes, of a model that knows nothing
    starts, train_step = [], recipe.train_step

    def timed(prompts: Any) -> Any:
        starts.append(time.perf_counter())
        return train_step(prompts)

    recipe.train_step = timed
    status: int = recipe.train()
    print(json.dumps({"seconds": [end - start for start, end in pairwise(starts)]}))
    return status


if __name__ == "__main__":
    sys.exit(main())
