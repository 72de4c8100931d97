"""What a run leaves for a comparison, and what `python -m oprd_tune compare` makes of three runs."""

import json
import math

import pytest

from oprd_tune.compare.command import main
from oprd_tune.metrics.step_log import read_log
from oprd_tune.run.launcher import run_recipe as launch
from tests.conftest import SMALL, load_config, recipe_class, run_recipe

NAME, CONFIG = "oprd_distributed", "tiny/oprd"
QUICK = {"evaluate_every_n_steps": 2, "checkpoint_every_n_steps": 2, "preflight": "false"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs: two seeds of one setting, and another setting."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        run_recipe(NAME, CONFIG, folder / f"base_seed{seed}", seed=seed, **QUICK)
    other = {"optimizer.lr": 1e-3, "loss.normalisation": "l2", "max_steps": 2}
    run_recipe(NAME, CONFIG, folder / "other", **QUICK, **other)
    return folder


def timeless(lines):
    """Without what depends on how fast and where a run ran."""
    kept = ("step", "tokens", "loss", "eval", "rollout", "layers", "head")
    return [{name: value for name, value in line.items() if name.startswith(kept)} for line in lines]


def test_a_resumed_runs_log_is_that_of_a_run_that_never_stopped(runs, out, tmp_path):
    recipe = recipe_class(NAME)(load_config(CONFIG, output_dir=out, **SMALL, **QUICK))
    recipe.setup()

    def crash_after_three_steps(prompts, train_step=recipe.train_step):
        return 1 / 0 if recipe.run.step == 3 else train_step(prompts)

    recipe.train_step = crash_after_three_steps
    with pytest.raises(ZeroDivisionError):
        recipe.train()
    assert [line["step"] for line in read_log(out)] == [0, 1, 2, 2, 3]  # two of step 2, which was evaluated too
    assert main([str(out), "--out", str(tmp_path / "compared")]) == 0  # a run without a summary
    run_recipe(NAME, CONFIG, out, resume="true", **QUICK)  # from step 2, the last checkpoint
    assert [line["step"] for line in read_log(out)] == [0, 1, 2, 2, 3, 4, 4]
    assert timeless(read_log(out)) == timeless(read_log(runs / "base_seed0"))


def test_three_runs_make_two_groups(runs, out, capsys):
    assert main([*map(str, sorted(runs.iterdir())), "--out", str(out), "--against", "seconds"]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "compare.md", "compare.png"]
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((out / "compare.json").read_text())
    assert [(group["name"], len(group["runs"])) for group in found["groups"]] == [("base", 2), ("other", 1)]
    assert found["differences"] == {
        "loss.normalisation": {"base": "none", "other": "l2"},
        "optimizer.lr": {"base": 0.006, "other": 0.001},
        "max_steps": {"base": 4, "other": 2},
    }
    summaries = [json.loads((runs / f"base_seed{seed}" / "summary.json").read_text()) for seed in (0, 1)]
    measured = found["groups"][0]["values"]
    for key, name in (("perplexity_after", "perplexity_after"), ("tokens_per_second", "tokens_per_second")):
        each = [summary[name] for summary in summaries]
        assert math.isclose(measured[key]["mean"], sum(each) / 2, rel_tol=1e-6)
        assert math.isclose(measured[key]["high"], max(each), rel_tol=1e-6)
    assert all(run["finished"] for group in found["groups"] for run in group["runs"])
    assert "optimizer.lr" in printed
    assert "| optimizer.lr | 0.006 | 0.001 |" in (out / "compare.md").read_text()


def test_a_run_says_what_its_numbers_mean_once(out, capsys):
    overrides = {**SMALL, **QUICK, "max_steps": 12, "optimizer.lr": 1.0, "max_new_tokens": 1}
    cfg = load_config(CONFIG, output_dir=out, **{**overrides, "eval_dataset.count": 200})
    assert launch(recipe_class(NAME), cfg) == 3  # it is worse than it was
    printed = capsys.readouterr()
    summary = json.loads((out / "summary.json").read_text())
    worse, endless = remarks = summary["remarks"]
    assert summary["failure"] == worse
    assert f"\nThis run has failed (exit status 3): {worse}\n" in printed.err
    assert list((out / "final").glob("*.safetensors"))
    assert worse.startswith("worse than at the start: the best was step 0 (accuracy 0.")
    assert endless.startswith("responses never end: ")
    assert all(f"  ! {sentence}\n" in printed.out for sentence in remarks)
    assert (printed.out.count(worse), printed.err.count(worse)) == (1, 2)  # when it happens, and at the end
    assert "step 10: responses never end" in printed.err
    assert printed.err.count("responses never end") == 1


@pytest.mark.parametrize("recipe", ["oprd_distributed", "opd_topk_distributed"])
def test_a_run_that_never_changed_its_student_is_no_success(out, capsys, recipe):
    config = {"oprd_distributed": "tiny/oprd", "opd_topk_distributed": "tiny/opd_topk"}[recipe]
    cut = {"max_new_tokens": 1, "truncated_responses": "drop", "max_steps": 2}
    assert launch(recipe_class(recipe), load_config(config, output_dir=out, **SMALL | cut)) == 3
    failure = json.loads((out / "summary.json").read_text())["failure"]
    assert failure.startswith("the student has not changed: 2 steps were skipped since no token was selected; see tr")
    assert f"exit status 3): {failure}" in capsys.readouterr().err
    again = load_config(config, output_dir=out, **SMALL | cut, seed=1)
    assert launch(recipe_class(recipe), again) == 2
    assert "holds another run" in capsys.readouterr().err
