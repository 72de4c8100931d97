"""Runs over a bridge, end to end on the embedded models."""

import json
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.modeling.bridge import Bridge
from oprd_tune.run.launcher import run_recipe as launch
from oprd_tune.training.bridge_fit import FIGURE, FILE, _Fit
from tests.conftest import SMALL, assert_same_student, load_config, recipe_class, run_recipe
from tests.modeling.bridges import PAIRS, make_bridge

NAME, CONFIG = "oprd_distributed", "tiny/bridge"
LOG = {"metric_logger._component_": "tests.distributed.components.JSONLogger"}
QUICK = {
    **SMALL,
    **LOG,
    "evaluate_teacher": "false",
    "eval_dataset": "null",
    "task_accuracy": "null",
    "reference_perplexity": "null",
    "lr_scheduler": "null",
    "bridge.prompts": 64,
    "bridge.held_out_prompts": 16,
    "bridge.basis": "predictive",
}
CPU = torch.device("cpu")


def config(out, name=CONFIG, **overrides):
    return load_config(name, output_dir=out, **{**QUICK, **overrides})


def run(out, name=NAME, config_name=CONFIG, **overrides):
    return run_recipe(name, config_name, out, **{**QUICK, **overrides})


def prepared(out, **overrides):
    recipe = recipe_class(NAME)(config(out, **overrides))
    recipe.setup()
    return recipe


def losses(folder):
    lines = [json.loads(line) for line in (folder / "tensorboard" / "log.jsonl").read_text().splitlines()]
    return [line["loss/total"] for line in lines if "loss/total" in line]


def assert_same_bridge(one, other):
    a, b = (load_file(folder / FILE) for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (Bridge.load(folder / FILE, device=CPU) for folder in (one, other))
    assert (a.pairs, a.rank, a.plan, a.belongs, a.report) == (b.pairs, b.rank, b.plan, b.belongs, b.report)


def refused(out, capsys, recipe=NAME, **overrides):
    """What a run that may not be says."""
    name = CONFIG if recipe == NAME else "tiny/bridge_plus_opd"
    assert launch(recipe_class(recipe), config(out, name, **overrides)) == 2
    message = capsys.readouterr().err.rpartition("error: ")[2]
    assert message.count("\n") == 1
    return message


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The folder of a run that fitted a bridge and trained on it."""
    folder = tmp_path_factory.mktemp("fitted")
    recipe = run(folder / "run", **{"checkpoint_every_n_steps": 2})
    held = {id(tensor) for own in recipe.teachers[0].bridge._layers.values() for tensor in vars(own).values()}
    trained = {id(p) for group in recipe.student.optimizer.param_groups for p in group["params"]}
    assert len(held) == 5 * 4
    assert not held & trained
    assert len(trained) == len(list(recipe.student.model.parameters()))
    recipe.teachers[0].bridge.save(folder / "after.safetensors")
    return folder / "run"


def test_a_run_leaves_its_bridge_with_a_table_and_a_figure(out, capsys):
    run(out)
    told = capsys.readouterr().out
    bridge = Bridge.load(out / FILE, device=CPU)
    assert "4 layer pairs, 128 against 192 wide, rank 32, basis predictive, fitted on 64 prompts" in told
    assert "moments 1.8 MiB in fp32 on cpu" in told
    assert "Bridge of rank 32, basis predictive" in told
    for student, teacher in ((1, 1), (2, 3), (3, 4), (4, 6)):
        fit = bridge.report[student]
        row = [student, teacher, *(f"{x:.3f}" for x in (fit.r_squared, fit.held_out_r_squared, fit.cosine))]
        assert list(map(str, row)) in [line.split() for line in told.splitlines()]
    mean = fmean(fit.cosine_by_rank[8] for fit in bridge.report.values())
    assert f" 8: {mean:.3f}, 16: " in told
    assert (out / FIGURE).stat().st_size > 10_000
    facts = bridge.belongs
    assert (facts.student["name"], facts.student["depth"], facts.student["width"]) == ("student", 4, 128)
    assert (facts.teacher["name"], facts.teacher["depth"], facts.teacher["width"]) == ("wide_teacher", 6, 192)
    assert facts.conventions["positions"] == "all"
    assert facts.conventions["anchor"] == "predict"
    assert facts.student["fingerprint"] != facts.teacher["fingerprint"]


def test_training_leaves_the_bridge_as_it_was(fitted):
    before, after = load_file(fitted / FILE), load_file(fitted.parent / "after.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first, *_, last = losses(fitted)
    assert last != first


def test_fit_only_ends_with_the_bridge_and_its_file_serves_another_run(fitted, out, tmp_path, capsys):
    fitting = tmp_path / "fitting"
    assert launch(recipe_class(NAME), config(fitting, **{"bridge.fit_only": "true"})) == 0
    assert f"bridge.fit_only: it lies in {fitting / FILE}" in capsys.readouterr().out
    assert_same_bridge(fitting, fitted)
    assert not (fitting / "final").exists()
    assert list((fitting / "checkpoints").iterdir()) == []
    run(out, **{"bridge.file": fitting / FILE, "bridge.basis": "predictive"})
    assert losses(out) == losses(fitted)
    assert_same_student(out, fitted)
    assert_same_bridge(out, fitted)
    assert "from" in capsys.readouterr().out


def test_two_steps_and_two_more_are_four_bit_by_bit_on_the_same_bridge(fitted, out, monkeypatch):
    run(out, max_steps=2)
    assert_same_bridge(out, fitted)
    before = (out / FILE).read_bytes(), (out / FILE).stat().st_mtime_ns
    monkeypatch.setattr(_Fit, "fit", lambda *_: pytest.fail("the bridge was fitted again"))
    run(out, resume="true")
    assert_same_student(fitted, out)
    assert ((out / FILE).read_bytes(), (out / FILE).stat().st_mtime_ns) == before


def test_a_resumed_run_keeps_to_its_bridge(out, capsys):
    assert launch(recipe_class(NAME), config(out, **{"bridge.fit_only": "true"})) == 0
    assert launch(recipe_class(NAME), config(out, resume="true", max_steps=1, **{"bridge.rank": 16})) == 2
    assert "its rank is 32, bridge.rank is 16" in capsys.readouterr().err
    assert launch(recipe_class(NAME), config(out, resume="true", max_steps=1, **{"bridge.basis": "pca"})) == 2
    assert "was fitted as {'rank': 32, 'basis': 'predictive'" in capsys.readouterr().err
    run(out, resume="true", max_steps=1)
    assert "bridge.rank: 32 then, 16 now" in refused(out, capsys, resume="true", **{"bridge.rank": 16})


def test_the_first_loss_is_what_the_report_says_of_unseen_rows(tmp_path):
    fitting = tmp_path / "fitting"
    plan = {"bridge.prompts": 512, "bridge.held_out_prompts": 256, "prompts_per_step": 256, "dataset.count": 2000}
    fit = config(fitting, **plan, **{"bridge.fit_only": "true", "bridge.rank": 8})
    assert launch(recipe_class(NAME), fit) == 0
    report = Bridge.load(fitting / FILE, device=CPU).report.values()
    unexplained = 1 - fmean(fit.held_out_r_squared for fit in report)
    cosine = fmean(fit.cosine for fit in report)
    assert 0.02 < 1 - fmean(fit.r_squared for fit in report) < unexplained < 0.7
    found = {}
    for normalisation in ("variance", "l2"):
        elsewhere = {"seed": 1, "max_steps": 1, "loss.normalisation": normalisation, "bridge.rank": 8}
        out = tmp_path / normalisation
        run(out, **{**plan, **elsewhere, "bridge.file": fitting / FILE})
        (found[normalisation],) = losses(out)
    assert found["variance"] == pytest.approx(unexplained, rel=0.1)
    assert found["l2"] == pytest.approx(2 - 2 * cosine, rel=0.1)


@pytest.mark.parametrize("basis", ["pca", "predictive"])
def test_a_teacher_keeps_its_top_only_where_the_basis_asks_for_it(basis, out, capsys, monkeypatch):
    """And only for the fit: training reads no more than the pairs."""
    depths, observe = [], _Fit._observe

    def note(self, teacher, *args, **kwargs):
        depths.append(len(teacher._model.layers))
        observe(self, teacher, *args, **kwargs)

    monkeypatch.setattr(_Fit, "_observe", note)
    recipe = prepared(out, layers="[1,2]", diagnostics_every_n_steps="null", **{"bridge.basis": basis})
    assert [(p.student, p.teacher) for p in recipe.teachers[0].pairs] == [(1, 1), (2, 3)]
    assert set(depths) == {6 if basis == "predictive" else 3}
    assert len(recipe.teachers[0].teacher._model.layers) == 3
    assert 0 < recipe.train_step(recipe.data.prompts.at_step(0)).loss < 1
    needed = capsys.readouterr().out
    assert f"teacher {'9.9' if basis == 'predictive' else '5.0'} MiB" in needed


def test_pairs_may_be_given_and_share_a_teacher_layer(out):
    recipe = prepared(out, layer_pairs="[[1,2],[2,2],[4,6]]", dtype="bf16", **{"bridge.basis": "reduced_rank"})
    bridge = Bridge.load(out / FILE, device=CPU)
    assert [(p.student, p.teacher) for p in bridge.pairs] == [(1, 2), (2, 2), (4, 6)]
    layers = recipe.teachers[0].bridge._layers
    assert torch.equal(layers[1].teacher_mean_C, layers[2].teacher_mean_C)
    assert not torch.equal(layers[1].teacher_RC, layers[2].teacher_RC)
    assert not torch.equal(layers[2].teacher_mean_C, layers[4].teacher_mean_C)
    assert 0 < recipe.train_step(recipe.data.prompts.at_step(0)).loss < 1
    assert set(recipe.teachers[0].teacher.targets(torch.ones(1, 3, dtype=torch.long), torch.arange(3)).states) == {
        1,
        2,
        4,
    }


def test_the_moments_are_those_of_the_trainings_own_states(out, monkeypatch):
    seen = {}
    add = _Fit._observe

    def observe(self, teacher, micro, on_pair, *, final):
        def record(layer, h, g, f):
            if final:
                seen.setdefault(layer, []).append((h.clone(), g.clone(), f.clone()))
            on_pair(layer, h, g, f)

        add(self, teacher, micro, record, final=final)

    monkeypatch.setattr(_Fit, "_observe", observe)
    recipe = prepared(out, positions="last_k", positions_k=2, prompts_per_step=16, tokens_per_micro_batch=60)
    rollout = recipe.engine.generate(recipe.data.prompts.at_step(0))
    selection = recipe.select(rollout)
    recipe.teachers[0].teacher._bridge = None
    targets = recipe.teachers[0].targets(rollout, selection.index_T, selection.index_T)
    assert sorted(seen) == [1, 2, 3, 4]
    for layer, batches in seen.items():
        h, g, f = map(torch.cat, zip(*batches, strict=True))
        assert h.shape[1:] == (128,)
        assert len(h) == len(g) == len(f) > len(selection)
        first = len(selection)
        for mine, wanted in ((g[:first], targets.states[layer]), (f[:first], targets.final_TC)):
            torch.testing.assert_close(mine.sum(0), wanted.sum(0), rtol=1e-3, atol=1e-3)
        fitted = recipe.teachers[0].bridge._layers[layer]
        torch.testing.assert_close(fitted.student_mean_D, h.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fitted.teacher_mean_C, g.mean(0), rtol=1e-4, atol=1e-4)


def test_every_setting_of_a_fit_reaches_it(fitted, tmp_path, capsys):
    def fit(name, **plan):
        plan = {f"bridge.{key}": value for key, value in plan.items()}
        assert launch(recipe_class(NAME), config(tmp_path / name, **plan, **{"bridge.fit_only": "true"})) == 0
        own = load_file(tmp_path / name / FILE)
        return own["layers.2.student_RD"], own["layers.2.student_mean_D"]

    plain = load_file(fitted / FILE)["layers.2.student_RD"]
    assert fit("uncentred", intercept="false")[1].count_nonzero() == 0
    ridged, mean = fit("ridge", ridge=0.1)
    assert mean.norm() > 1
    assert ridged.norm() < 0.8 * plain.norm()
    assert (fit("diagonal", ridge=0.1, ridge_scale="diagonal")[0] - ridged).norm() > 1e-2 * ridged.norm()
    assert 0 < (fit("precise", ridge=0.1, moments_dtype="fp64")[0] - ridged).norm() < 1e-4 * ridged.norm()
    told = capsys.readouterr().err
    assert " 64/64 " in told
    assert " 16/16 " in told


def test_a_bridge_beside_a_token_loss(out):
    recipe = run(out, "opd_topk_distributed", "tiny/bridge_plus_opd", max_steps=1, **{"bridge.rank": 16})
    logged = recipe.run.journal.logged
    assert logged["loss/total"] == pytest.approx(logged["loss/opd"] + logged["loss/bridge"], rel=1e-5)
    assert 1 < logged["loss/bridge"] < 30  # 100 times what the bridge leaves unexplained
    assert logged["loss/opd"] > 0.1
    assert Bridge.load(out / FILE, device=CPU).rank == 16
    assert recipe.teachers[0].teacher._bridge is recipe.teachers[0].bridge


def test_without_a_single_state_there_is_no_bridge(out, capsys):
    cut = config(out, max_new_tokens=1, truncated_responses="drop")
    assert launch(recipe_class(NAME), cut) == 1
    assert "error: no state was selected on the bridge's prompts" in capsys.readouterr().err
    assert not (out / FILE).exists()


def test_few_states_are_told(out, capsys):
    assert launch(recipe_class(NAME), config(out, **{"bridge.prompts": 4, "bridge.fit_only": "true"})) == 0
    assert "states are few for a regression on 128 coordinates" in capsys.readouterr().out


BAD_INPUTS = {
    "no bridge": ({"bridge": "null"}, "need a bridge (the section `bridge`, and the loss BridgedMSE or"),
    "no bridge for equal widths": (
        {"bridge": "null", "teacher": "tiny/teacher"},
        "BridgedMSE needs a bridge; give the section `bridge`",
    ),
    "no loss that uses it": (
        {"loss._component_": "oprd_tune.losses.HiddenStateMSE", "loss.normalisation": "none"},
        "there is a section `bridge`, but no loss that uses it",
    ),
    "too many directions": ({"bridge.rank": 193}, "bridge.rank is 193, but the teacher is 192 wide: at most that"),
    "basis": ({"bridge.basis": "svd"}, "bridge.basis is 'svd'; allowed are pca, reduced_rank, predictive"),
    "normalisation": ({"loss.normalisation": "rms"}, "'rms'; allowed are l2, variance, none"),
    "argument": (
        {"bridge.ranks": 8},
        "argument bridge.ranks ('~bridge.ranks' takes it away); did you mean 'rank'?",
    ),
    "missing file": ({"bridge.file": "nowhere"}, "bridge.file: there is no file nowhere"),
    "damaged file": ({"bridge.file": "{files}/damaged"}, "damaged is damaged or incomplete"),
    "no bridge's file": ({"bridge.file": "{files}/other_models.txt"}, "other_models.txt is damaged or incomplete"),
    "other models' file": (
        {"bridge.file": "{files}/other"},
        "student width 5 in the file, 128 in this run",
    ),
    "file of another rank": ({"bridge.file": "{files}/own", "bridge.rank": 8}, "its rank is 32, bridge.rank is 8"),
    "file of other layers": (
        {"bridge.file": "{files}/own", "layer_pairs": "[[1,2],[4,6]]"},
        "it lacks the layer pairs [[1, 2]]; it has [[1, 1], [2, 3], [3, 4], [4, 6]]",
    ),
    "file of other weights": (
        {"bridge.file": "{files}/own", "student": "tiny/teacher"},
        "its student, student, has other weights than teacher. Leave bridge.file out to fit one; bridge.same_weights",
    ),
    "both": ({"bridge.file": "{files}/own", "bridge.fit_only": "true"}, "give one of them"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_explained_before_a_model_is_loaded(case, fitted, out, monkeypatch, tmp_path, capsys):
    own = (fitted / FILE).read_bytes()
    (tmp_path / "own").write_bytes(own)
    (tmp_path / "damaged").write_bytes(own[:-5000])
    (tmp_path / "other_models.txt").write_text("nothing")
    make_bridge(PAIRS).save(tmp_path / "other")
    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", lambda self: pytest.fail("a model was loaded"))
    overrides, message = BAD_INPUTS[case]
    overrides = {k: v.format(files=tmp_path) if isinstance(v, str) else v for k, v in overrides.items()}
    if overrides.get("bridge") == "null":
        overrides |= {"bridge.prompts": None, "bridge.held_out_prompts": None}
    assert message in refused(out, capsys, **overrides)
    assert not (out / "config.yaml").exists()


def test_bad_input_is_explained_beside_a_token_loss_too(fitted, out, monkeypatch, capsys):
    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", lambda self: pytest.fail("a model was loaded"))
    both = "opd_topk_distributed"
    assert "at most that" in refused(out, capsys, both, **{"bridge.rank": 193})
    assert "its rank is 32, bridge.rank is 128" in refused(
        out, capsys, both, **{"bridge.file": fitted / FILE, "bridge.rank": 128}
    )


def test_a_file_serves_no_other_states_but_other_weights_if_allowed(fitted, out, tmp_path, capsys):
    own = {"bridge.file": fitted / FILE, "max_steps": 1}
    assert "anchor 'predict' in the file, 'consume' in this run" in refused(out, capsys, anchor="consume", **own)
    assert "positions 'all' in the file, 'last' in this run" in refused(
        tmp_path / "last", capsys, positions="last", **own
    )
    other = {"student": "tiny/teacher", "bridge.same_weights": "false"}
    run(tmp_path / "other", **own, **other)
    assert_same_bridge(tmp_path / "other", fitted)
    assert losses(tmp_path / "other")[0] > 1.2 * losses(fitted)[0]


def test_preflight_tells_of_a_bridge_and_counts_it(fitted, out, capsys):
    def told(**overrides):
        assert launch(recipe_class(NAME), config(out, preflight="only", **overrides)) == 0
        return capsys.readouterr().out

    text = told(**{"bridge.moments_dtype": "fp64", "bridge.basis": "pca", "bridge.rank": 8})
    assert "bridge      4 layer pairs, 128 against 192 wide, rank 8, basis pca, fitted on 64 prompts" in text
    bytes_of = 4 * (128**2 + 128 * 192 + 192**2) * 8
    assert f"moments {bytes_of / 2**20:.1f} MiB in fp64 on cpu, while it is fitted" in text
    text = told(**{"bridge.file": fitted / FILE, "layers": "[1,2]"})
    assert f"bridge      2 layer pairs, 128 against 192 wide, from {fitted / FILE}" in text
    assert "moments" not in text
