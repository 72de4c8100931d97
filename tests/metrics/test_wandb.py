"""The Weights & Biases logger, without a network."""

import pytest

pytest.importorskip("wandb")

from oprd_tune.metrics.wandb import WandBLogger
from oprd_tune.protocols import RichLogger
from oprd_tune.run.launcher import run_recipe as launch
from tests.conftest import ENDED, SMALL, load_config, recipe_class

WANDB = {
    "metric_logger._component_": "oprd_tune.metrics.wandb.WandBLogger",
    "metric_logger.project": "tests",
    "log_samples_every_n_steps": 2,
    "checkpoint_every_n_steps": 2,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_numbers_texts_and_figures_reach_it_and_a_resumed_run_is_the_same_run(out):
    assert issubclass(WandBLogger, RichLogger)
    for steps in ({"max_steps": 2}, {"resume": "true"}):
        cfg = load_config("tiny/oprd", output_dir=out, **{**SMALL, **WANDB, **steps})
        assert launch(recipe_class("oprd_distributed"), cfg) in ENDED
    identity = (out / "wandb" / "wandb_run_id").read_text()
    runs = sorted((out / "wandb" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(run.name.endswith(identity) for run in runs)
    for run in runs:
        media = [path.relative_to(run / "files" / "media") for path in (run / "files" / "media").rglob("*.*")]
        assert {path.parts[0] for path in media} == {"html", "images"}
        assert any("samples" in path.name for path in media)
        assert any("cosine_by_position" in path.name for path in media)
        assert (run / f"run-{identity}.wandb").stat().st_size > 1000


def test_a_logger_of_torchtunes_takes_numbers_alone_and_the_run_says_so(out, capsys):
    component = {"metric_logger._component_": "torchtune.training.metric_logging.StdoutLogger", "max_steps": 1}
    cfg = load_config("tiny/oprd", output_dir=out, **{**SMALL, **component})
    assert launch(recipe_class("oprd_distributed"), cfg) in ENDED
    said = capsys.readouterr().out
    assert said.count("metric_logger: StdoutLogger takes numbers, but no texts and figures, so there are none") == 1
