"""A student of a quantised teacher, on two ranks."""

import json

from tests.conftest import ENDED, load_config, recipe_class
from tests.distributed.spawn import run_ranks

PLACEMENTS = ("replicated", "sharded")  # by torchao, and in our own layout
QUICK = {"max_steps": 2, "prompts_per_step": 4, "eval_dataset.count": 20, "dataset.count": 64}


def run(rank, folder, overrides, placements=PLACEMENTS):
    for placement in placements:
        teacher = {"teacher_quantization": "int8_weight_only", "teacher_placement": placement}
        cfg = load_config("tiny/oprd", output_dir=folder / placement, **teacher, **overrides)
        recipe = recipe_class("oprd_distributed")(cfg)
        recipe.setup()
        assert recipe.train() in ENDED


def summaries(folder, placements=PLACEMENTS):
    return [json.loads((folder / placement / "summary.json").read_text()) for placement in placements]


def test_its_error_is_measured_and_recorded(tmp_path):
    run_ranks(run, 2, tmp_path / "ranks", tmp_path, QUICK)
    for summary in summaries(tmp_path):
        errors = summary["teacher_errors"]
        assert sorted(errors) == ["1", "2", "3", "4"]
        assert all(0 < error < 0.03 for error in errors.values())
