"""The recipe of the token losses end to end on the tiny pair."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.modeling.weights import load_decoder
from oprd_tune.preflight.pair import check_same_tokens
from oprd_tune.ranks import Ranks
from oprd_tune.run.launcher import run_recipe as launch
from oprd_tune.tiny import checkpointer, tiny_qwen2
from oprd_tune.tiny.model import write_tokenizer
from tests.conftest import SMALL, assert_same_student, load_config, recipe_class, run_recipe, weights

NAME = "opd_topk_distributed"
CONFIGS = ["tiny/opd_topk", "tiny/opd_sampled", "tiny/opd_full", "tiny/vopd", "tiny/oprd_plus_opd"]
MODELS = "tests.recipes.models"


@pytest.fixture(autouse=True)
def _folder_for_models(monkeypatch, tmp_path):
    monkeypatch.setenv("TEST_FOLDER", str(tmp_path))


@pytest.mark.long
def test_the_student_approaches_its_teacher(out):
    size = {"max_steps": 60, "prompts_per_step": 64, "dataset.count": 5000, "eval_dataset.count": 1000}
    run_recipe(NAME, "tiny/vopd", out, **size)
    assert json.loads((out / "summary.json").read_text())["gap_closed"] > 0.08


@pytest.mark.parametrize("config", ["tiny/opd_topk", "tiny/vopd", "tiny/oprd_plus_opd"])
def test_two_steps_and_two_more_are_four_bit_by_bit(config, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    schedule = {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup"}
    run_recipe(NAME, config, whole, **schedule)
    run_recipe(NAME, config, parts, max_steps=2, **schedule)
    run_recipe(NAME, config, parts, resume="true", **schedule)
    assert_same_student(whole, parts)


@pytest.mark.parametrize("config", CONFIGS)
def test_neither_microbatches_nor_checkpointing_change_the_course(config, tmp_path):
    losses = []
    for i, extra in enumerate(({}, {"tokens_per_micro_batch": 20}, {"activation_checkpointing": "true"})):
        recipe = run_recipe(NAME, config, tmp_path / str(i), **extra)
        losses.append([recipe.run.journal.logged[name] for name in ("loss/total", "optimizer/grad_norm")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == losses[0]
    assert_same_student(tmp_path / "0", tmp_path / "2")


@pytest.mark.parametrize("config", CONFIGS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(config, out):
    recipe = run_recipe(NAME, config, out, max_steps=1, **{"student": "tiny/teacher"})
    assert abs(recipe.run.journal.logged["loss/total"]) < 1e-6
    assert recipe.run.journal.logged["optimizer/grad_norm"] < 1e-5


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ("tiny/opd_topk", {"token/support_kl", "token/student_mass"}),
        ("tiny/opd_sampled", {"token/kl"}),
        ("tiny/opd_full", {"token/kl"}),
        ("tiny/vopd", {"token/kl"}),
        ("tiny/oprd_plus_opd", {"token/kl", "layers/cosine_04", "loss/opd", "loss/oprd"}),
    ],
)
def test_logs_what_its_objective_knows(config, names, out):
    recipe = run_recipe(NAME, config, out, diagnostics_every_n_steps=2, diagnostics_tokens=5)
    logged = recipe.run.journal.logged
    assert names <= logged.keys()
    assert {"diagnostics/kl", "diagnostics/teacher_mass", "diagnostics/variance_vopd"} <= logged.keys()
    assert 0 < logged["diagnostics/top_k_overlap"] <= 1
    assert logged["diagnostics/variance_vopd"] >= 0
    if "loss/opd" in logged:
        assert math.isclose(logged["loss/opd"] + logged["loss/oprd"], logged["loss/total"], rel_tol=1e-6)


def test_loss_and_gradient_are_those_of_the_formula_on_the_recipe_s_own_rollout(out):
    """vOPD with an importance ratio: it reads tokens, the sampler's log-probabilities, and both models."""
    recipe = recipe_class(NAME)(load_config("tiny/vopd", output_dir=out, **SMALL, tokens_per_micro_batch=20))
    recipe.setup()
    prompts = recipe.data.prompts.at_step(0)
    rollout = recipe.engine.generate(prompts, stream=0)
    student, teacher = (
        load_decoder(tiny_qwen2, checkpointer(name, str(out)), dtype=torch.float32, device=torch.device("cpu"))
        for name in ("student", "teacher")
    )
    noise = torch.linspace(-1, 1, rollout.sampler_logprobs_BS.numel()).view_as(rollout.sampler_logprobs_BS)
    shifted = replace(rollout, sampler_logprobs_BS=rollout.sampler_logprobs_BS + noise)
    recipe.engine.generate = lambda prompts, stream: shifted
    (loss,) = recipe.loss.parts.values()
    loss.importance_ratio_cap = 2.0
    metrics = recipe.train_step(prompts).metrics.reduce(Ranks())

    at = shifted.response_mask_BS[:, 1:]
    tokens, mu = shifted.tokens_BS[:, 1:][at], shifted.sampler_logprobs_BS[:, 1:][at]
    log_p, log_q = (m(shifted.tokens_BS)[:, :-1][at].log_softmax(-1) for m in (student, teacher))
    chosen, reference = (x.gather(1, tokens[:, None]).squeeze(1) for x in (log_p, log_q))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    ratio = (chosen - mu).exp().clamp(max=2.0)
    wanted = -((ratio * (reference - chosen + kl)).detach() * chosen).mean()
    wanted.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm().item()
    assert metrics["loss/total"] == pytest.approx(wanted.item(), rel=1e-4)
    assert metrics["optimizer/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["token/importance_ratio"] == pytest.approx(ratio.mean().item(), rel=1e-4)
    assert metrics["token/logprob_gap"] == pytest.approx((chosen - mu).abs().mean().item(), rel=1e-4)


def test_looks_at_whole_distributions_only_when_it_is_time(out):
    recipe = run_recipe(NAME, "tiny/opd_topk", out, max_steps=3, diagnostics_every_n_steps=2)
    assert not any(name.startswith("diagnostics") for name in recipe.run.journal.logged)


def test_diagnoses_the_same_kl_as_the_loss(out):
    recipe = run_recipe(NAME, "tiny/opd_full", out, max_steps=1, diagnostics_every_n_steps=1, diagnostics_tokens=1000)
    logged = recipe.run.journal.logged
    assert math.isclose(logged["diagnostics/kl"], logged["token/kl"], rel_tol=1e-5)
    assert math.isclose(logged["token/kl"], logged["loss/total"], rel_tol=1e-6)


def test_a_composite_is_the_sum_of_its_parts(tmp_path):
    run_recipe(NAME, "tiny/opd_full", tmp_path / "token", max_steps=2)
    extra = {
        "loss.weights.opd": 1.0,
        "loss.weights.oprd": 0.0,
        "optimizer.lr": load_config("tiny/opd_full").optimizer.lr,
    }
    run_recipe(NAME, "tiny/oprd_plus_opd", tmp_path / "composite", max_steps=2, **extra)
    assert_same_student(tmp_path / "token", tmp_path / "composite")
    hidden = run_recipe("oprd_distributed", "tiny/oprd", tmp_path / "hidden", max_steps=1)
    both = run_recipe(NAME, "tiny/oprd_plus_opd", tmp_path / "both", max_steps=1)
    weight = load_config("tiny/oprd_plus_opd").loss.weights.oprd
    wanted = weight * hidden.run.journal.logged["loss/total"]
    assert math.isclose(both.run.journal.logged["loss/oprd"], wanted, rel_tol=1e-5)


def test_rms_scales_of_a_hidden_part_are_calibrated(out):
    recipe = run_recipe(NAME, "tiny/oprd_plus_opd", out, max_steps=1, **{"loss.parts.oprd.normalisation": "rms"})
    assert sorted(recipe.loss.hidden.scales) == [1, 2, 3, 4]


@pytest.mark.parametrize("padded", ["model", "teacher_model"])
@pytest.mark.parametrize("config", ["tiny/opd_full", "tiny/opd_topk", "tiny/vopd"])
def test_padded_vocabularies_are_compared_on_shared_tokens(config, padded, tmp_path):
    plain = run_recipe(NAME, config, tmp_path / "plain", max_steps=2)
    files = padded.replace("model", "checkpointer")
    extra = {
        f"{padded}._component_": f"{MODELS}.padded_tiny_qwen2",
        f"{padded}.vocab_size": 24,
        f"{files}._component_": f"{MODELS}.padded_checkpointer",
        f"{files}.vocab_size": 24,
        f"{files}.name": "student" if padded == "model" else "teacher",
        "student" if padded == "model" else "teacher": "null",
        "tokenizer": "tiny/student",
    }
    recipe = run_recipe(NAME, config, tmp_path / "padded", max_steps=2, **extra)
    assert recipe.teachers[0].heads.vocabulary == 16
    logged, wanted = recipe.run.journal.logged, plain.run.journal.logged
    assert math.isclose(logged["loss/total"], wanted["loss/total"], rel_tol=1e-5)
    assert logged["rollout/response_tokens"] == wanted["rollout/response_tokens"]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("plain", "padded")]
    for key in ("student_after", "perplexity_after", "teacher"):
        assert summaries[1][key] == pytest.approx(summaries[0][key], rel=1e-3)


def test_teachers_of_other_width_may_grade_tokens(out):
    extra = {
        "teacher_model._component_": f"{MODELS}.wider_tiny_qwen2",
        "teacher_checkpointer._component_": f"{MODELS}.wider_checkpointer",
        "teacher": "null",
    }
    recipe = run_recipe(NAME, "tiny/opd_full", out, max_steps=1, **extra)
    assert recipe.run.journal.logged["token/kl"] > 0.5


def test_an_untied_head_learns_too(tmp_path):
    extra = {"model._component_": f"{MODELS}.untied_tiny_qwen2"}
    extra |= {"checkpointer._component_": f"{MODELS}.untied_checkpointer", "student": "null"}
    extra |= {"tokenizer": "tiny/student"}
    run_recipe(NAME, "tiny/opd_topk", tmp_path / "out", **extra)
    before, after = weights(tmp_path / "student_untied"), weights(tmp_path / "out" / "final")
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert not torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])


def test_the_sampler_may_supply_the_support(tmp_path):
    """The native engine samples with the student itself, so its top-k is the student's."""
    own = run_recipe(NAME, "tiny/opd_topk", tmp_path / "own", max_steps=2)
    given = run_recipe(NAME, "tiny/opd_topk", tmp_path / "given", max_steps=2, **{"loss.support": "sampler"})
    for name in ("loss/total", "token/student_mass", "optimizer/grad_norm"):
        assert math.isclose(given.run.journal.logged[name], own.run.journal.logged[name], rel_tol=1e-4)


BAD_INPUTS = {
    "k": ("tiny/opd_topk", {"loss.k": 17}, "loss.k is 17, but student and teacher share 16 tokens"),
    "k of one": ("tiny/opd_topk", {"loss.k": 1}, "it must be a whole number, at least 2"),
    "support": ("tiny/opd_topk", {"loss.support": "both"}, "allowed are student, teacher, union, sampler"),
    "other tokens": (
        "tiny/opd_full",
        {"teacher_checkpointer._component_": f"{MODELS}.other_tokens_checkpointer"},
        "do not share their tokens: 2 of 16 ids differ, for example 12 is '+' and '='",
    ),
    "no parts": ("tiny/oprd_plus_opd", {"loss.parts": "null"}, "loss.parts is None; it must be a section"),
    "negative weight": (
        "tiny/oprd_plus_opd",
        {"loss.weights.oprd": -1},
        "loss.weights.oprd is -1; it must be a finite number",
    ),
    "weight of nothing": ("tiny/oprd_plus_opd", {"loss.weights.kl": 1}, "names kl; the parts are opd, oprd"),
    "part's argument": ("tiny/oprd_plus_opd", {"loss.parts.opd.kk": 3}, "takes no argument loss.parts.opd.kk"),
    "parts that are none": ("tiny/oprd_plus_opd", {"loss.parts": 3}, "loss.parts is 3; it must be a section"),
    "foreign loss": (
        "tiny/opd_full",
        {"loss._component_": "oprd_tune.tiny.tokenizer"},
        "none of the losses in oprd_tune.losses",
    ),
    "infinite weight": ("tiny/oprd_plus_opd", {"loss.weights.opd": ".inf"}, "loss.weights.opd is inf; it must be"),
    "half a token": ("tiny/opd_topk", {"loss.k": 2.5}, "loss.k is 2.5; it must be a whole number"),
    "no loss": (
        "tiny/oprd_plus_opd",
        {"loss.parts.opd._component_": "oprd_tune.tiny.tokenizer"},
        "loss.parts.opd is no loss",
    ),
    "hidden states alone": (
        "tiny/opd_full",
        {"loss._component_": "oprd_tune.losses.HiddenStateMSE"},
        "loss has no token part; losses on hidden states alone are for oprd_distributed",
    ),
    "off-policy sampling": ("tiny/vopd", {"rollout.temperature": 0.7}, "unbiased only where they are equal"),
    "needless ratio": ("tiny/opd_sampled", {"loss.importance_ratio_cap": 2.0}, "trainer's own model samples"),
    "head": (
        "tiny/opd_full",
        {"model._component_": f"{MODELS}.biased_tiny_qwen2"},
        "its LM head is Linear with a bias; token losses need",
    ),
    "diagnostics": ("tiny/opd_full", {"diagnostics_k": 0}, "diagnostics_k is 0; it must be a whole number, at least 1"),
    "widths of a hidden part": (
        "tiny/oprd_plus_opd",
        {"teacher_model._component_": f"{MODELS}.wider_tiny_qwen2"},
        "need a bridge",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_explained_before_a_model_is_loaded(case, out, monkeypatch, capsys):
    config, overrides, message = BAD_INPUTS[case]
    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", lambda self: pytest.fail("a model was loaded"))
    cfg = load_config(config, **{"output_dir": out, **SMALL, **overrides})
    assert launch(recipe_class(NAME), cfg) == 2
    assert message in capsys.readouterr().err.rpartition("error: ")[2]


def test_a_folder_without_a_tokenizer_is_named(out, capsys):
    out.mkdir()
    check_same_tokens(out, out)
    assert "has no tokenizer.json: whether student and teacher share their tokens is not checked" in (
        capsys.readouterr().out
    )


def test_other_names_of_special_tokens_are_told(tmp_path, capsys):
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    for folder in (student, teacher):
        folder.mkdir()
        write_tokenizer(folder)
    check_same_tokens(student, teacher)
    assert capsys.readouterr().out == ""
    file = teacher / "tokenizer.json"
    file.write_text(file.read_text().replace("<eos>", "<end>"))
    check_same_tokens(student, teacher)
    assert "1 special tokens differ between student and teacher: 1 is '<eos>' and '<end>'" in capsys.readouterr().out


def test_summary_holds_the_curve(out):
    run_recipe(NAME, "tiny/opd_topk", out, evaluate_every_n_steps=2)
    evaluations = json.loads((out / "summary.json").read_text())["evaluations"]
    assert [e["step"] for e in evaluations] == [0, 2, 4]
    assert evaluations[0]["seconds"] == 0 < evaluations[1]["seconds"] < evaluations[2]["seconds"]
