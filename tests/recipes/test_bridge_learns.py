"""What bridges are for: students that learn from teachers of another shape and with other tokens."""

import json
from pathlib import Path

import pytest

from tests.conftest import ENDED, load_config, recipe_class

SHORT = {"max_steps": 60, "evaluate_every_n_steps": 60, "bridge.prompts": 1000}
RATE = {"optimizer.lr": 2e-3}  # the shipped ones want their 200 steps


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")


def gain(out, config, change=None, **overrides):
    """Accuracy after a short run minus accuracy before."""
    cfg = load_config(config, output_dir=out, **SHORT, **overrides)
    recipe = recipe_class(cfg.recipe)(cfg)
    recipe.setup()
    if change is not None:
        change(recipe)
    assert recipe.train() in ENDED
    summary = json.loads((out / "summary.json").read_text())
    return summary["student_after"] - summary["student_before"]


@pytest.mark.long
def test_a_wider_deeper_teacher_of_another_seed_teaches_through_a_bridge(tmp_path):
    assert gain(tmp_path, "tiny/bridge", **RATE) >= 0.10


@pytest.mark.long
def test_a_teacher_with_other_tokens_teaches_where_states_are_aligned_and_not_where_they_are_late(tmp_path):
    assert gain(tmp_path / "aligned", "tiny/cross_tokenizer") >= 0.06
    assert gain(tmp_path / "late", "tiny/cross_tokenizer", **{"reader._component_": "misaligned.LateReader"}) <= 0


@pytest.mark.long
def test_a_bridge_beside_full_kl_teaches_more_than_holding_the_student_still(tmp_path):
    def hold(recipe):
        from held_near_start import HeldNearStart

        recipe.teachers[0].teacher = HeldNearStart(recipe)

    beside = gain(tmp_path / "bridge", "tiny/bridge_plus_opd", **RATE)
    held = gain(tmp_path / "held", "tiny/bridge_plus_opd", hold, **RATE)
    assert beside >= 0.14
    assert beside >= held + 0.04
