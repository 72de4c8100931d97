"""Several teachers, each of which reads its own prompts: losses against their formulas, and whole runs."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from oprd_tune.config import OPRDSettings, resolve
from oprd_tune.metrics.names import is_described
from oprd_tune.run.launcher import run_recipe as launch
from tests.conftest import ENDED, SMALL, assert_same_student, load_config, recipe_class
from tests.recipes.test_privileged_teacher import states_and_logits

TWO = {"dataset._component_": "oprd_tune.tiny.two_tasks", "eval_dataset._component_": "oprd_tune.tiny.two_tasks"}
TEACHERS = {"teacher": "null", "teachers.addition": "tiny/teacher", "teachers.reversal": "tiny/reversing_teacher"}
CONSTANT = {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup"}


def run(out, config="tiny/two_teachers", status=ENDED, **overrides):
    cfg = load_config(config, output_dir=out, **{**SMALL, **CONSTANT, **overrides})
    assert launch(recipe_class(cfg.recipe), cfg) in status
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] if 2 not in status else []


@pytest.mark.slow
def test_the_student_learns_both_tasks_but_not_from_teachers_that_read_the_other_ones_prompts(tmp_path):
    found = {}
    for shuffled in ("false", "true"):
        cfg = load_config(
            "tiny/two_teachers",
            output_dir=tmp_path / shuffled,
            **{"max_steps": 100, "eval_dataset.count": 600, "dataset.shuffled": shuffled},
        )
        assert launch(recipe_class(cfg.recipe), cfg) in ENDED
        found[shuffled] = json.loads((tmp_path / shuffled / "summary.json").read_text())["by_teacher"]
    assert found["false"]["addition"]["teacher"] > 0.97
    assert found["false"]["reversal"]["teacher"] > 0.97
    assert found["false"]["addition"]["after"] > 0.6
    assert found["false"]["reversal"]["after"] > 0.8
    assert max(task["after"] for task in found["true"].values()) < 0.4


def test_losses_are_those_of_each_row_read_alone_by_its_teacher(tmp_path):
    """Eq. 6 and the full KL, row by row, without padding; parts and teachers add up."""
    overrides = {**SMALL, **TWO, **TEACHERS, "max_steps": 1, "prompts_per_step": 8}
    cfg = load_config("tiny/oprd_plus_opd", output_dir=tmp_path, **overrides)
    recipe = recipe_class(cfg.recipe)(cfg)
    recipe.setup()
    prompts = recipe.data.prompts.at_step(0)
    sampled = recipe.engine.generate(prompts)
    recipe.engine.generate = lambda *_, **__: sampled
    with torch.no_grad():
        rows = [by_hand(recipe, prompts, sampled, row) for row in range(len(sampled))]
    metrics = recipe.train_step(prompts).metrics.reduce(recipe.ranks)
    names = ["addition", "reversal"]
    assert {name for name, _, _ in rows} == {*names}
    everything = torch.cat([kl_T for _, kl_T, _ in rows])
    assert metrics["token/kl"] == pytest.approx(everything.mean().item(), rel=1e-5)
    total = 0.0
    for name in names:
        kl_T = torch.cat([kl_T for whose, kl_T, _ in rows if whose == name])
        error_T = torch.cat([error_T for whose, _, error_T in rows if whose == name])
        assert metrics[f"teachers/{name}/token/kl"] == pytest.approx(kl_T.mean().item(), rel=1e-5)
        weights = recipe.loss.weights
        share = (weights["opd"] * kl_T.sum() + weights["oprd"] * error_T.sum()).item() / len(everything)
        assert metrics[f"teachers/{name}/loss"] == pytest.approx(share, rel=1e-5)
        total += share
    assert metrics["loss/total"] == pytest.approx(total, rel=1e-5)
    assert all(map(is_described, metrics))


def by_hand(recipe, prompts, sampled, row):
    """The teacher's name, the KL and the mean error over its layers at each token of a row."""
    place = prompts.positions.index(int(sampled.prompt_positions_B[row]))
    (side,) = (teacher for teacher in recipe.teachers if teacher.name == prompts.teachers[place])
    tokens, start = sampled.tokens_BS[row, : int(sampled.lengths_B[row])].tolist(), len(prompts.tokens[place])
    own, own_logits = states_and_logits(recipe.student.model, side.heads.student_VD, tokens)
    other, other_logits = states_and_logits(side.teacher._model, side.heads.teacher_VC, tokens)
    here = slice(start - 1, len(tokens) - 1)
    errors = [(own[p.student - 1][here] - other[p.teacher - 1][here]).square().mean(-1) for p in side.pairs]
    log_p, log_q = own_logits[here].log_softmax(-1), other_logits[here].log_softmax(-1)
    return side.name, (log_p.exp() * (log_p - log_q)).sum(-1), torch.stack(errors).mean(0)


UNALIKE = {
    **TWO,
    **{"teacher": "null", "teacher_model": "null", "teacher_checkpointer": "null", "teacher_tokenizer": "null"},
    **{"teachers.addition.teacher": "tiny/teens_teacher", "teachers.addition.teacher_placement": "offloaded"},
    **{"teachers.addition.bridge.rank": 8, "teachers.reversal.teacher": "tiny/reversing_teacher"},
    **{"teachers.reversal.bridge.rank": 16, "checkpoint_every_n_steps": 1},
    **{"bridge.prompts": 16, "bridge.held_out_prompts": 16},
}


def test_each_may_have_its_own_tokens_bridge_and_place_and_the_run_resumes(tmp_path, capsys):
    config = "tiny/cross_tokenizer"
    rows = run(tmp_path / "whole", config, **UNALIKE)
    said = capsys.readouterr().out
    assert "bridge addition   4 layer pairs, 128 against 192 wide, rank 8" in said
    assert "bridge reversal   4 layer pairs, 128 against 128 wide, rank 16" in said
    trained = [row for row in rows if "loss/total" in row]
    assert len(trained) == 4
    assert any(0.3 < row["rollout/matched_share"] < 1 for row in trained)
    for name in ("addition", "reversal"):
        assert (tmp_path / "whole" / f"bridge_{name}.safetensors").is_file()
    run(tmp_path / "parts", config, **UNALIKE, max_steps=2)
    run(tmp_path / "parts", config, **UNALIKE, resume="true")
    assert_same_student(tmp_path / "whole", tmp_path / "parts")


def test_one_that_reads_nothing_in_a_step_does_not_run(tmp_path):
    cfg = load_config("tiny/two_teachers", output_dir=tmp_path, **SMALL)
    recipe = recipe_class(cfg.recipe)(cfg)
    recipe.setup()
    prompts = recipe.data.prompts.at_step(0)
    additions = [p for p, name in zip(prompts.positions, prompts.teachers, strict=True) if name == "addition"]
    assert 0 < len(additions) < len(prompts)
    ran = []
    for side in recipe.teachers:
        targets = side.teacher.targets
        side.teacher.targets = lambda *asked, _of=(side.name, targets), **how: (
            ran.append(_of[0]) or _of[1](*asked, **how)
        )
    result = recipe.train_step(prompts.among(additions))
    assert ran == ["addition"]
    assert result.loss > 0


def test_rms_is_measured_on_all_teachers_and_quantised_ones_are_told_apart(tmp_path, capsys):
    recipe, prompts = prepared(
        tmp_path,
        {"reversal": {"teacher": "tiny/reversing_teacher", "teacher_quantization": "int8_weight_only"}},
        **{"loss.normalisation": "rms", "prompts_per_step": 8},
    )
    assert "Quantised teacher reversal: relative error" in capsys.readouterr().out
    assert list(recipe.run.journal.history.teacher_errors) == ["reversal"]
    assert [pair.settings.teacher_quantization for pair in recipe.pairs_seen] == [None, "int8_weight_only"]
    rollout = recipe.data.read(recipe.run.sample(prompts), prompts)
    squares = []
    for number, teacher in enumerate(recipe.teachers):
        micro = rollout.of_teacher(number)
        index_T = recipe.select(micro).index_T
        squares.append(teacher.targets(micro, index_T).states[4].square().mean(-1))
    assert all(len(square_T) > 5 for square_T in squares)
    recipe.train_step(prompts)
    assert recipe.loss.scales[4] == pytest.approx(torch.cat(squares).mean().item(), rel=1e-5)


def prepared(folder, entries, config="tiny/two_teachers", **overrides):
    """A recipe that is set up, with these entries of `teachers`, and its first prompts."""
    cfg = load_config(config, output_dir=folder, **{**SMALL, **overrides})
    teachers = OmegaConf.to_container(cfg.teachers)
    cfg.teachers = {**{name: entry for name, entry in teachers.items() if name not in entries}, **entries}
    make_recipe = recipe_class(cfg.recipe)
    names, seen = make_recipe.setup.__globals__, []
    load_pairs = names["load_pairs"]
    names["load_pairs"] = lambda *args, **given: seen.append(load_pairs(*args, **given)) or seen[0]
    recipe = make_recipe(cfg)
    recipe.setup()
    recipe.pairs_seen = seen[0]
    return recipe, recipe.data.prompts.at_step(0)


def test_what_one_has_of_its_own_is_not_the_others(tmp_path):
    own = {"teacher": "tiny/teacher", "teacher_placement": "offloaded", "min_matched_share": 0.1}
    cfg = load_config("tiny/two_teachers", output_dir=tmp_path, teacher_placement="sharded")
    cfg.teachers = {"addition": own, "reversal": "tiny/reversing_teacher"}
    settings, parts = resolve(cfg, OPRDSettings, recipe="oprd_distributed")
    each = [own for _, own in parts.of_each_teacher(settings).values()]
    assert [(s.teacher_placement, s.min_matched_share) for s in (settings, *each)] == [
        ("sharded", 0.5),
        ("offloaded", 0.1),
        ("sharded", 0.5),
    ]


def test_one_that_is_the_student_itself_may_stand_first_and_its_average_is_counted(tmp_path, capsys):
    """The other does not become a moving average; the average's memory is predicted, and it moves."""
    predicted = {}
    for weights in ("initial", "{ema: 0.5}"):
        entry = {"teacher": "student", "teacher_weights": OmegaConf.create(weights) if "{" in weights else weights}
        cfg = load_config("tiny/two_teachers", output_dir=tmp_path / "out", preflight="only", **SMALL)
        cfg.teachers = {"addition": entry, "reversal": "tiny/reversing_teacher"}
        assert launch(recipe_class(cfg.recipe), cfg) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "student 3.0 MiB" in line)
        predicted[weights] = float(line.partition("teacher ")[2].partition(" MiB")[0])
    assert predicted["{ema: 0.5}"] - predicted["initial"] == pytest.approx(3.0, abs=0.1)
    entries = {
        "addition": {"teacher": "student", "teacher_weights": {"ema": 0.5}},
        "reversal": "tiny/reversing_teacher",
    }
    recipe, prompts = prepared(tmp_path / "run", entries)
    own, other = (side.teacher._model.layers[0].attn.q_proj.weight for side in recipe.teachers)
    before = [own.clone(), other.clone()]
    recipe.train_step(prompts)
    assert not torch.equal(own, before[0])
    assert torch.equal(other, before[1])


def test_one_with_fewer_tokens_reads_idle_microbatches_too(tmp_path):
    """An idle row stands for a teacher without prompts, whatever the other's tokens are: its ids must exist."""
    unlike = {key: value for key, value in UNALIKE.items() if "bridge" not in key}
    bridges = {"bridge.rank": 8, "bridge.prompts": 16, "bridge.held_out_prompts": 16}
    cfg = load_config("tiny/cross_tokenizer", output_dir=tmp_path, **{**SMALL, **CONSTANT, **unlike, **bridges})
    recipe = recipe_class(cfg.recipe)(cfg)
    recipe.setup()
    prompts = recipe.data.prompts.at_step(0)
    additions = prompts.among(
        [p for p, name in zip(prompts.positions, prompts.teachers, strict=True) if name == "addition"]
    )
    rollout = recipe.data.read(recipe.run.sample(additions), additions)
    reversing = rollout.of_teacher(1)
    assert reversing.response_tokens == 0
    assert reversing.teacher_tokens.tolist() == [[0]]
    recipe.teachers[1].targets(reversing, recipe.select(reversing).teacher_index_T)


def test_all_bridges_are_fitted_before_a_run_that_only_fits_ends(tmp_path, capsys):
    overrides = {**SMALL, **CONSTANT, **UNALIKE, "bridge.fit_only": "true"}
    cfg = load_config("tiny/cross_tokenizer", output_dir=tmp_path, **overrides)
    assert launch(recipe_class(cfg.recipe), cfg) == 0
    files = [str(tmp_path / f"bridge_{name}.safetensors") for name in ("addition", "reversal")]
    assert f"they lie in {', '.join(files)}; bridge.file takes it" in capsys.readouterr().out
    assert all(Path(file).is_file() for file in files)


def test_an_accuracy_of_all_teachers_needs_all_of_them(tmp_path):
    entry = {"teacher": "tiny/reversing_teacher", "evaluate_teacher": False}
    recipe, _ = prepared(tmp_path, {"reversal": entry}, max_steps=1)
    assert recipe.train() in ENDED
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["teacher"], summary["gap_closed"]) == (None, None)
    assert summary["by_teacher"]["addition"]["teacher"] > 0.5
    assert summary["by_teacher"]["reversal"]["teacher"] is None


class NoCounts:
    """An evaluator of a user's with what one teacher needs."""

    def __init__(self, dataset, tokenizer, **_):
        self.request = None

    def memory_bytes(self, model, dtype):
        return 0

    def __call__(self, model):
        return 0.5


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"teacher": "tiny/teacher"}, "teacher has no effect beside `teachers`"),
        ({"teachers.addition": "tiny/none"}, "teachers.addition: teacher"),
        ({"teachers.third": "tiny/teacher"}, "teachers.third: it reads no prompt of `dataset`"),
        ({"teachers.a-b": "tiny/teacher"}, "teachers has the name 'a-b'; allowed are letters, digits and _"),
        ({"teachers": "tiny/teacher"}, "teachers is 'tiny/teacher'; give names, each with a teacher"),
        ({"teachers.reversal": 3}, "teachers.reversal is 3; give a model folder"),
        ({"teachers.third.placement": "offloaded"}, "has no key 'placement'; did you mean 'teacher_placement'?"),
        ({"teachers.third.prompts": "[addition]"}, "teachers.third lacks `teacher`"),
        ({"dataset._component_": "oprd_tune.tiny.addition"}, "does not say who reads a prompt"),
        (
            {
                "eval.benchmarks": "[gsm8k]",
                "eval.teacher": "true",
                "eval.grader": "oprd_tune.grading.exact_match",
                "eval.max_new_tokens": 8,
            },
            "eval.teacher asks one teacher, and the config has `teachers`",
        ),
        ({"teachers.teacher": "tiny/teacher"}, "teachers has the name 'teacher', which stands for one that is alone"),
        (
            {"task_accuracy._component_": f"{__name__}.NoCounts"},
            "NoCounts lacks grader, samples, which",
        ),
    ],
)
def test_mistakes_are_told_before_weights_are_read(tmp_path, capsys, overrides, said):
    run(tmp_path / "out", status=(2,), **overrides)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"teacher_weights": "live"}, "teachers.third: teacher_weights is live, which is for a student that"),
        ({"min_matched_share": "many"}, "teachers.third: min_matched_share is 'many'; it must be float"),
        ({"prompts": "addition"}, "teachers.third.prompts is 'addition'; give a list"),
        ({"prompts": [1, 2]}, "teachers.third: it reads no prompt of `dataset`"),
        ({"prompts": ["addition"]}, "both teachers.addition and teachers.third read the prompts 'addition'"),
        ({"layers": [9]}, "teachers.third has no key 'layers'"),
        ({"teacher_prompt_template": "{prompt}"}, "it belongs to `dataset` and counts for all teachers"),
        (
            {"layer_pairs": [[1, 1], [4, 4]]},
            "teachers.third is paired with the student's layers [1, 4], and",
        ),
        ({"teacher": "tiny/wide_teacher"}, "teachers.third: the student is 128 wide and the teacher 192"),
    ],
)
def test_mistakes_in_an_entry_name_it(tmp_path, capsys, entry, said):
    cfg = load_config("tiny/two_teachers", output_dir=tmp_path / "out", **SMALL)
    cfg.teachers.third = {"teacher": "tiny/teacher", **entry}
    assert launch(recipe_class(cfg.recipe), cfg) == 2
    assert said in capsys.readouterr().err
