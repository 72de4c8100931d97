"""Students that teach themselves: by their first weights, by those of now, and by their moving average."""

import gc
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from oprd_tune.losses.masking import response_tokens
from oprd_tune.modeling.heads import LMHead
from oprd_tune.run.launcher import run_recipe as launch
from oprd_tune.teacher.self_teaching import MovingAverage
from oprd_tune.training.student import Student
from tests.conftest import ENDED, SMALL, assert_same_student, load_config, make_model, recipe_class

CONSTANT = {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup", "checkpoint_every_n_steps": 1}
SELF = {"teacher": "student", "dataset.teacher_prompt_template": "'{answer}={prompt}'", "optimizer.lr": 1e-3}
WEIGHTS = {
    "initial": {**SELF, "teacher_weights": "initial"},
    "live": {**SELF, "teacher_weights": "live"},
    "ema": {**SELF, "teacher_weights.ema": 0.5},
}


FILES = {
    "teacher_checkpointer._component_": "oprd_tune.tiny.checkpointer",
    "teacher_checkpointer.name": "teacher",
}


def prepared(out, config, **overrides):
    cfg = load_config(config, output_dir=out, **{**SMALL, **CONSTANT, **overrides})
    return recipe_class(cfg.recipe)(cfg)


def run(out, config, status=ENDED, **overrides):
    cfg = load_config(config, output_dir=out, **{**SMALL, **CONSTANT, **overrides})
    assert launch(recipe_class(cfg.recipe), cfg) in status


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_run_resumes_bit_by_bit(tmp_path, kind):
    """The moving average is no function of the last weights, so a checkpoint has to hold it."""
    run(tmp_path / "whole", "tiny/oprd_plus_opd", **WEIGHTS[kind])
    run(tmp_path / "parts", "tiny/oprd_plus_opd", **WEIGHTS[kind], max_steps=2)
    run(tmp_path / "parts", "tiny/oprd_plus_opd", **WEIGHTS[kind], resume="true")
    assert_same_student(tmp_path / "whole", tmp_path / "parts")
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[-2] for name in ("whole", "parts")]
    whole, parts = ({k: v for k, v in json.loads(row).items() if k[:4] in ("loss", "laye", "toke")} for row in rows)
    assert whole == parts


@pytest.mark.slow
def test_a_student_learns_to_do_without_the_hint_that_its_teacher_reads(tmp_path):
    size = {"max_steps": 60, "eval_dataset.count": 1000, "dataset.count": 20000, "prompts_per_step": 64}
    run(tmp_path, "tiny/self_distillation", (0,), **size, evaluate_every_n_steps=60, checkpoint_every_n_steps=60)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["teacher"] > 0.95
    assert summary["student_after"] > summary["student_before"] + 0.05


def test_the_first_weights_are_those_of_the_students_folder(tmp_path):
    run(tmp_path / "folder", "tiny/oprd", **{**SELF, "teacher": "tiny/student"})
    run(tmp_path / "word", "tiny/oprd", **WEIGHTS["initial"])
    assert_same_student(tmp_path / "folder", tmp_path / "word")


@pytest.mark.parametrize("kind", WEIGHTS)
def test_each_teacher_has_the_weights_that_it_says(tmp_path, kind):
    """Before each update, its targets are those of a plain model with the expected weights."""
    recipe = prepared(tmp_path, "tiny/oprd_plus_opd", **WEIGHTS[kind], activation_checkpointing="true")
    recipe.setup()
    expected = prepared(tmp_path / "other", "tiny/oprd_plus_opd", **WEIGHTS["initial"])
    expected.setup()
    model = expected.teachers[0].teacher._model
    for step in range(3):
        prompts = recipe.data.prompts.at_step(step)
        rollout = recipe.data.read(recipe.engine.generate(prompts), prompts)
        tokens, selection = response_tokens(rollout), recipe.select(rollout)
        asked = rollout, selection.teacher_index_T, tokens.teacher_index_T
        got, wanted = recipe.teachers[0].targets(*asked), expected.teachers[0].targets(*asked)
        assert recipe.student.model.training
        assert not got.final_TC.requires_grad
        torch.testing.assert_close(got.final_TC, wanted.final_TC, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.states, wanted.states, rtol=1e-5, atol=1e-5)
        assert recipe.train_step(prompts).loss > 0
        now = dict(recipe.student.model.named_parameters())
        share = {"initial": 0.0, "live": 1.0, "ema": 0.5}[kind]
        with torch.no_grad():
            for name, weight in model.named_parameters():
                own = next(now[key] for key in now if key.replace("_checkpoint_wrapped_module.", "") == name)
                weight.lerp_(own, share)


def test_a_live_teacher_takes_no_memory(tmp_path):
    """Bytes of all tensors once a run is set up: those of the student alone. The others hold a second model."""
    held = {}
    for kind, overrides in WEIGHTS.items():
        recipe = prepared(tmp_path / kind, "tiny/oprd", **overrides, diagnostics_every_n_steps="null")
        before = tensor_bytes()
        recipe.setup()
        held[kind] = tensor_bytes() - before
        student = sum(p.nbytes for p in recipe.student.model.parameters())
        del recipe
    assert held["live"] < 1.1 * student
    assert held["initial"] > 1.9 * student
    assert held["ema"] > 2.9 * student


def tensor_bytes():
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if is_tensor(t)}
    return sum(storages.values())


def is_tensor(found):
    return type(found) in (torch.Tensor, nn.Parameter) and found.device.type == "cpu"


def test_the_average_is_exact_where_the_teacher_is_coarse():
    """In bf16, steps of 0.01 vanish. The average is kept in fp32, and the teacher is what it rounds to."""
    student, teacher = make_model(), make_model()
    teacher.to(torch.bfloat16)
    average = MovingAverage(student, teacher, 0.99)
    start = student.norm.scale.detach().clone()
    with torch.no_grad():
        student.norm.scale += 0.01
    for _ in range(100):
        average.update()
    wanted = start + 0.01 * (1 - 0.99**100)
    torch.testing.assert_close(average.tensors["norm.scale"], wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(teacher.norm.scale, wanted.to(torch.bfloat16))
    assert not torch.equal(teacher.norm.scale, start.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"teacher": "tiny/teacher", "teacher_weights": "live"}, "give `teacher: student`"),
        ({"teacher_weights": "last"}, "allowed are initial, live and `ema: 0.99`"),
        ({"teacher_weights.ema": 1.5}, "teacher_weights.ema is 1.5"),
        ({"teacher_weights.mean": 0.5}, "allowed are initial, live and `ema: 0.99`"),
        ({"teacher_weights": "live", "dataset.teacher_prompt_template": "null"}, "they never differ"),
        ({"teacher_weights": "live", "teacher_placement": "sharded"}, "leave teacher_placement out"),
        ({"teacher_weights.ema": 0.5, "teacher_placement": "offloaded"}, "an offloaded teacher cannot change"),
        ({"teacher_weights.ema": 0.5, "teacher_quantization": "int8_weight_only"}, "a quantised teacher cannot change"),
        ({"teacher_weights.ema": 0.5, "lora.rank": 4}, "only adapters train"),
        ({"teacher_weights": "live", "bridge.rank": 8, "bridge.prompts": 8}, "a bridge is fitted to a teacher"),
        ({"~student": None}, "there is no `student`"),
        ({"teacher_model._component_": "oprd_tune.tiny.tiny_qwen2", **FILES}, "teacher has no effect beside"),
    ],
)
def test_what_cannot_work_is_told_before_weights_are_read(tmp_path, capsys, overrides, said):
    overrides = {**SELF, **overrides}
    cfg = load_config(
        "tiny/oprd", output_dir=tmp_path, **{k: v for k, v in {**SMALL, **overrides}.items() if k[0] != "~"}
    )
    for key in overrides:
        if key.startswith("~"):
            del cfg[key[1:]]
    assert launch(recipe_class(cfg.recipe), cfg) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("config", "warns"), [("tiny/oprd", True), ("tiny/oprd_plus_opd", False)])
def test_states_that_may_agree_on_nothing_are_warned_of(tmp_path, capsys, config, warns):
    prepared(tmp_path, config, **WEIGHTS["live"]).setup()
    assert ("may come to agree on states that say nothing" in capsys.readouterr().out) is warns


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_follows_too_although_the_teacher_is_cut_off_from_it(tied):
    model, first = make_model(tied=tied), make_model(tied=tied)
    student = object.__new__(Student)
    student.model = model
    pair = SimpleNamespace(layers=[], settings=SimpleNamespace(teacher_decay=0.5))
    head = LMHead(first)
    student.taught_by(first, pair, final=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    before = head.weight_VD.clone()
    student.average.update()
    torch.testing.assert_close(head.weight_VD, before + 0.5)
