"""The section `eval` end to end: curves of two benchmarks, exact resumption, and nothing that disturbs training."""

import json

import pytest

from oprd_tune.errors import RolloutError
from oprd_tune.rollout import NativeEngine
from oprd_tune.run.launcher import run_recipe as launch
from tests.conftest import ENDED, assert_same_student, load_config, recipe_class
from tests.distributed.spawn import run_ranks

NAME, CONFIG = "oprd_distributed", "tiny/oprd"
ADDITION = "oprd_tune.tiny.addition"
SMALL = {
    **{"max_steps": 4, "prompts_per_step": 4, "dataset.count": 64, "checkpoint_every_n_steps": 2},
    **{"optimizer.lr": 3e-3, "lr_scheduler._component_": "oprd_tune.training.constant_with_warmup"},
    **{"eval_dataset": "null", "task_accuracy": "null", "reference_perplexity": "null"},
}
BRIDGE = {"bridge.prompts": 64, "bridge.held_out_prompts": 16}
EVAL = {
    **{"eval.grader": "oprd_tune.grading.exact_match", "eval.max_new_tokens": 10, "eval.samples_per_problem": 3},
    **{"eval.every_n_steps": 2, "eval.first": 9, "eval.problems_per_batch": 4},
    **{"eval.benchmarks.one._component_": ADDITION, "eval.benchmarks.one.split": "held_out"},
    **{"eval.benchmarks.one.count": 20, "eval.benchmarks.two._component_": ADDITION},
    **{"eval.benchmarks.two.split": "train", "eval.benchmarks.two.count": 5},
}


def run(out, config=CONFIG, recipe=NAME, **overrides):
    return launch(recipe_class(recipe), load_config(config, output_dir=out, **{**SMALL, **overrides}))


def samples(out, file="eval_samples.jsonl"):
    """All lines without their times."""
    found = [json.loads(line) for line in (out / file).read_text().splitlines()]
    return [{key: value for key, value in one.items() if key != "seconds"} for one in found]


def logged(out, *prefixes):
    """The metrics whose names begin so, by step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        own = {name: value for name, value in line.items() if name.startswith(prefixes)}
        found.setdefault(line["step"], {}).update(own)
    return {step: own for step, own in found.items() if own}


def rows(out):
    """The steps of all rows, and whether each is an evaluation."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], "loss/total" not in line) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four steps with two benchmarks, and the teacher's answers."""
    out = tmp_path_factory.mktemp("eval") / "whole"
    assert run(out, **EVAL, **{"eval.teacher": "true"}) in ENDED
    return out


def test_each_benchmark_has_a_curve_of_its_own(whole):
    curves = logged(whole, "eval/")
    assert list(curves) == [0, 2, 4]
    found = [one for one in samples(whole) if one["model"] == "student"]
    assert len(found) == 3 * (9 + 5) * 3
    for step, metrics in curves.items():
        for name, size in (("one", 9), ("two", 5)):
            own = [one for one in found if (one["step"], one["benchmark"]) == (step, name)]
            assert [(s["problem"], s["number"]) for s in own] == [(i, n) for i in range(size) for n in range(3)]
            rights = [[s["right"] for s in own if s["problem"] == i] for i in range(size)]
            assert metrics[f"eval/{name}/avg_at_k"] == pytest.approx(sum(map(sum, rights)) / (3 * size))
            assert metrics[f"eval/{name}/best_at_k"] == pytest.approx(sum(map(any, rights)) / size)
            assert metrics[f"eval/{name}/tokens"] == pytest.approx(sum(s["tokens"] for s in own) / len(own))
            assert metrics[f"eval/{name}/truncated_share"] == 0
            assert metrics[f"eval/{name}/teacher_avg_at_k"] > 0.95
    assert all(s["right"] == (s["response"].strip() == s["answer"]) for s in found)
    assert len({json.dumps(curve) for curve in curves.values()}) > 1  # the student has moved


def test_the_summary_holds_the_last_value_with_its_interval(whole):
    summary = json.loads((whole / "summary.json").read_text())
    first, last = logged(whole, "eval/")[0], logged(whole, "eval/")[4]
    for name, size in (("one", 9), ("two", 5)):
        found = summary["benchmarks"][name]
        after = found["avg_at_k"]
        assert after["value"] == pytest.approx(last[f"eval/{name}/avg_at_k"])
        assert after["low"] <= after["value"] <= after["high"]
        assert found["before"] == pytest.approx(first[f"eval/{name}/avg_at_k"])
        assert (found["problems"], found["k"]) == (size, 3)
        assert found["teacher"] > 0.95
    assert [row["step"] for row in summary["evaluations"]] == [0, 2, 4]
    scores = {row["step"]: row["avg_at_k"] for row in summary["evaluations"]}
    assert summary["best_step"] == max(scores, key=scores.get)
    assert (whole / "best").exists() == any(scores[step] > scores[0] for step in (2, 4))


def test_math_eval_gives_the_exported_student_the_same_answers(whole, tmp_path):
    cfg = load_config("tiny/eval", output_dir=tmp_path / "eval", max_new_tokens=10, samples_per_problem=3)
    cfg.models = {"student": str(whole / "final"), "before": "tiny/student"}
    cfg.rollout.temperature = 0.7
    cfg.benchmarks = {
        "one": {"_component_": ADDITION, "split": "held_out", "count": 20},
        "two": {"_component_": ADDITION, "split": "train", "count": 5},
    }
    assert launch(recipe_class("math_eval"), cfg) == 0
    there = samples(tmp_path / "eval", "samples.jsonl")
    for name, step in (("student", 4), ("before", 0)):
        wanted = [one for one in there if one["model"] == name and one["problem"] < 9]
        found = [one for one in samples(whole) if (one["model"], one["step"]) == ("student", step)]
        for one in (*wanted, *found):
            one.pop("step", None)
            one["model"] = ""
        key = lambda one: (one["benchmark"], one["problem"], one["number"])  # noqa: E731
        assert sorted(found, key=key) == sorted(wanted, key=key)


def test_a_killed_run_that_goes_on_leaves_the_same_files(whole, tmp_path, monkeypatch):
    """It ends after the checkpoint of step 2, in the middle of the answers at step 3."""
    out, generate, calls = tmp_path / "out", NativeEngine.generate, []
    often = {**EVAL, "eval.every_n_steps": 1, "eval.teacher": "true"}

    def kill(self, prompts, *, stream=0, request=None):
        calls.append(request)
        if self._policy_version == 3 and request is not None and calls[-2] is not None:
            raise RuntimeError("killed")
        return generate(self, prompts, stream=stream, request=request)

    monkeypatch.setattr(NativeEngine, "generate", kill)
    with pytest.raises(RuntimeError, match="killed"):
        run(out, **often)
    monkeypatch.setattr(NativeEngine, "generate", generate)
    with (out / "eval_samples.jsonl").open("a") as file:
        file.write('{"step": 3, "seconds": 0.1, "tokens": 4}\n{"step": 3, "mod')
    assert run(out, **often, resume="true") in ENDED
    assert run(tmp_path / "other", **often) in ENDED
    assert samples(out) == samples(tmp_path / "other")
    assert logged(out, "eval/", "loss/") == logged(tmp_path / "other", "eval/", "loss/")
    assert_same_student(out, whole)
    even = [one for one in samples(out) if one["step"] % 2 == 0]
    assert even == samples(whole)  # how often is asked changes nothing


def test_an_engine_that_fails_at_an_evaluation_loses_none(out, tmp_path, monkeypatch):
    """Also if the run that catches up on it is killed before its next checkpoint."""
    generate = NativeEngine.generate

    def lose(self, prompts, *, stream=0, request=None):
        if self._policy_version == 2 and request is not None:
            raise RolloutError("no server is left")
        return generate(self, prompts, stream=stream, request=request)

    def kill(self, prompts, *, stream=0, request=None):
        if request is None:
            raise RuntimeError("killed")
        return generate(self, prompts, stream=stream, request=request)

    with monkeypatch.context() as patch:
        patch.setattr(NativeEngine, "generate", lose)
        assert run(out, **EVAL) == 1
        assert list(logged(out, "eval/")) == [0]
        patch.setattr(NativeEngine, "generate", kill)
        with pytest.raises(RuntimeError, match="killed"):
            run(out, **EVAL, resume="true")
    assert list(logged(out, "eval/")) == [0, 2]
    assert run(out, **EVAL, resume="true") in ENDED
    assert run(tmp_path / "other", **EVAL) in ENDED
    assert samples(out) == samples(tmp_path / "other")
    assert rows(out) == rows(tmp_path / "other")
    assert_same_student(out, tmp_path / "other")


@pytest.mark.parametrize(("recipe", "config"), [(NAME, CONFIG), ("opd_topk_distributed", "tiny/opd_topk")])
def test_training_is_the_same_without_the_section(recipe, config, out, tmp_path):
    extra = {"task_accuracy": "null", "eval_dataset": "null"}
    assert run(out, config, recipe, **extra) in ENDED
    assert run(tmp_path / "with", config, recipe, **extra, **EVAL) in ENDED
    assert logged(out, "loss/", "rollout/", "optimizer/") == logged(
        tmp_path / "with", "loss/", "rollout/", "optimizer/"
    )
    assert_same_student(out, tmp_path / "with")


def on_ranks(rank, folder, name):
    few = {"eval.benchmarks.two.count": 1, "eval.problems_per_batch": 2, "optimizer.lr": 0.0}
    assert run(folder / name, **{**EVAL, **few}, teacher_placement="sharded", **{"eval.teacher": "true"}) in ENDED


@pytest.mark.long
def test_two_processes_give_the_answers_of_one(tmp_path):
    """Also where one of them has no problem."""
    on_ranks(0, tmp_path, "one")
    run_ranks(on_ranks, 2, tmp_path / "ranks", tmp_path, "two")
    assert samples(tmp_path / "two") == samples(tmp_path / "one")
    assert logged(tmp_path / "two", "eval/") == logged(tmp_path / "one", "eval/")


def test_a_teacher_with_other_tokens_answers_in_its_own(out):
    assert run(out, "tiny/cross_tokenizer", **EVAL, **BRIDGE, max_steps=1, **{"eval.teacher": "true"}) in ENDED
    first, second = (
        [one for one in samples(out) if one["model"] == name and one["step"] == 0] for name in ("teacher", "student")
    )
    assert [one["answer"] for one in first] == [one["answer"] for one in second]
    assert logged(out, "eval/")[0]["eval/one/teacher_avg_at_k"] > 0.9


def test_what_is_measured_must_stay_but_not_how_often(out, capsys):
    assert run(out, **EVAL, max_steps=2) in ENDED
    changed = {"eval.samples_per_problem": 2, "eval.first": 3, "eval.temperature": 1.0, "eval.max_new_tokens": 9}
    changed |= {"eval.seed": 1, "eval.benchmarks.one.count": 19}
    for key, value in changed.items():
        assert run(out, **{**EVAL, key: value}, resume="true") == 2
        assert f"{key}: " in capsys.readouterr().err
    assert run(out, **{**EVAL, "eval.every_n_steps": 1, "eval.problems_per_batch": 2}, resume="true") in ENDED
    assert list(logged(out, "eval/")) == [0, 2, 3, 4]


def test_a_run_may_go_on_with_the_section_or_without(out):
    assert run(out, max_steps=2) in ENDED
    assert run(out, **EVAL, max_steps=4, resume="true") in ENDED
    assert run(out, max_steps=6, resume="true") in ENDED
    assert list(logged(out, "eval/")) == [4]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["best_step"] == 4
    assert summary["benchmarks"]["one"]["before"] == summary["benchmarks"]["one"]["avg_at_k"]["value"]


def test_accuracy_goes_before_benchmarks(out):
    held_out = {"eval_dataset": {"_component_": ADDITION, "split": "held_out", "count": 20}}
    cfg = load_config(CONFIG, output_dir=out, **{**SMALL, **EVAL, "evaluate_every_n_steps": 2})
    cfg.eval_dataset = held_out["eval_dataset"]
    cfg.task_accuracy = {"grader": "oprd_tune.grading.exact_match", "max_new_tokens": 8}
    assert launch(recipe_class(NAME), cfg) in ENDED
    summary = json.loads((out / "summary.json").read_text())
    scores = {row["step"]: row["accuracy"] for row in summary["evaluations"]}
    assert summary["best_step"] == max(scores, key=scores.get)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eval.benchmarks": "[math5]"}, "dataset.benchmark 'math5' is not known; did you mean 'math500'?"),
        ({"eval.benchmarks": "null"}, "the config lacks eval.benchmarks"),
        ({"eval.benchmarks": "{a/b: {}}"}, "eval.benchmarks has the name 'a/b'; allowed are letters, digits and _"),
        ({"eval.grader": "nowhere.grade"}, "eval.grader 'nowhere.grade' cannot be found"),
        ({"eval.grader": "null"}, "the config lacks eval.grader"),
        ({"eval.max_new_tokens": 500}, "eval: the longest problem has 8 tokens, and max_new_tokens is 500"),
        ({"eval.max_new_tokens": "many"}, "eval.max_new_tokens is 'many'; it must be int"),
        ({"eval.samples_per_problem": 0}, "eval.samples_per_problem is 0; it must be a whole number, at least 1"),
        ({"eval.first": 0}, "eval.first is 0; it must be a whole number, at least 1"),
        ({"eval.temperature": -1}, "eval.temperature is -1.0; it must be a finite number, 0 or above"),
        ({"eval.every_n_steps": 1.5}, "eval.every_n_steps is 1.5; it must be int"),
        ({"eval.sample_per_problem": 3}, "eval has no key 'sample_per_problem'; did you mean 'samples_per_problem'?"),
        ({"eval.profile": "papers"}, "eval.profile is 'papers'; allowed are paper, greedy"),
        ({"eval.benchmarks.one.counts": 3}, "takes no argument eval.benchmarks.one.counts"),
        (
            {"rollout._component_": "tests.recipes.test_eval_section.OldEngine"},
            "eval: OldEngine cannot answer benchmarks: its `generate` has to take a `request`",
        ),
    ],
)
def test_mistakes_are_explained_before_a_model_is_loaded(overrides, message, out, capsys):
    given = {} if overrides.get("eval.benchmarks", "").startswith("{") else EVAL
    if "eval.benchmarks" in overrides:
        given = {key: value for key, value in EVAL.items() if not key.startswith("eval.benchmarks")}
    if "eval.sample_per_problem" in overrides:
        given = {key: value for key, value in EVAL.items() if key != "eval.samples_per_problem"}
    assert run(out, **{**given, **overrides}) == 2
    assert message in capsys.readouterr().err
    assert not (out / "checkpoints").exists()


def test_a_benchmark_without_answers_is_refused(out, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1="}\n')
    cfg = load_config(CONFIG, output_dir=out, **{**SMALL, **EVAL})
    cfg.eval.benchmarks = {"mine": {"source": str(tmp_path / "rows.jsonl"), "prompt_template": "{prompt}"}}
    assert launch(recipe_class(NAME), cfg) == 2
    assert "eval.benchmarks.mine has no reference answers" in capsys.readouterr().err


class OldEngine(NativeEngine):
    """From before requests could be given to `generate`."""

    def generate(self, prompts, *, stream=0):
        return super().generate(prompts, stream=stream)


def test_an_engine_that_takes_no_request_still_trains(out):
    assert run(out, max_steps=1, **{"rollout._component_": "tests.recipes.test_eval_section.OldEngine"}) in ENDED


def test_preflight_counts_what_the_answers_take(out, capsys):
    large = {**EVAL, "eval.first": 20, "eval.problems_per_batch": 20, "eval.max_new_tokens": 100}
    told = []
    for extra in ({}, large):
        assert run(out, preflight="only", **extra) in ENDED
        told.append(capsys.readouterr().out)
    assert "one 20 × 3, two 5 × 3, every 2 steps" in told[1]
    assert "75 answers of at most 100 tokens each time; sampling 60 at once takes" in told[1]
    taken = [float(text.partition("besides sampling ")[2].split(" MiB")[0]) for text in told]
    assert taken[1] > 5 * taken[0]
