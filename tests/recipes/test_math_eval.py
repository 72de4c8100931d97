"""math_eval end to end on the embedded models: its numbers, its resumption, and its messages."""

import json
import math
import shutil
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist

from oprd_tune.evaluation import TaskAccuracy
from oprd_tune.evaluation.samples import SampleFile
from oprd_tune.modeling.folders import find_folder
from oprd_tune.modeling.weights import hugging_face_checkpointer, load_decoder
from oprd_tune.rollout import NativeEngine
from oprd_tune.run.eval_folder import EvalFolder
from oprd_tune.run.launcher import run_recipe as launch
from oprd_tune.tiny import addition, tiny_qwen2, tokenizer
from oprd_tune.tiny.model import MAX_SEQ_LEN, SYMBOLS, write_tokenizer
from tests.conftest import load_config, recipe_class
from tests.distributed.spawn import run_ranks
from tests.teacher.transformers_models import save_model

NAME = "math_eval"
SMALL = {"benchmarks.addition.count": 20, "problems_per_batch": 6}


def evaluate(out, models=None, **overrides):
    cfg = load_config("tiny/eval", output_dir=out, **{**SMALL, **overrides})
    if models is not None:
        cfg.models = models
    return launch(recipe_class(NAME), cfg)


def samples(out):
    """All samples without their times, in an order of their own."""
    found = [asdict(sample) | {"seconds": 0} for sample in SampleFile(out / "samples.jsonl").read()]
    return sorted(found, key=lambda s: (s["model"], s["benchmark"], s["problem"], s["number"]))


def test_the_accuracies_are_those_that_training_reports(out):
    assert evaluate(out, **{"benchmarks.addition.count": 200, "problems_per_batch": 200}) == 0
    summary = json.loads((out / "summary.json").read_text())
    dataset = addition(tokenizer(), split="held_out", count=200)
    for name in ("student", "teacher"):
        files = hugging_face_checkpointer(str(find_folder("x", f"tiny/{name}")), str(out / "unused"))
        model = load_decoder(tiny_qwen2, files, dtype=torch.float32, device=torch.device("cpu"))
        grader = "oprd_tune.grading.exact_match"
        measured = TaskAccuracy(dataset, tokenizer(), grader=grader, max_new_tokens=8, seed=9)(model)
        found = summary["benchmarks"]["addition"][name]
        slack = 2 * math.sqrt(measured * (1 - measured) / 200)  # the other measure samples once
        assert found["avg_at_k"]["low"] - slack <= measured <= found["avg_at_k"]["high"] + slack
        assert summary[f"{name}_avg_at_k"] == found["avg_at_k"]["value"]
        assert found["pass_at"]["4"] == found["best_at_k"]
        assert (found["problems"], found["k"]) == (200, 4)
    difference = summary["benchmarks"]["addition"]["teacher"]["difference"]
    assert difference["low"] > 0.3
    assert difference["value"] == pytest.approx(summary["teacher_avg_at_k"] - summary["student_avg_at_k"])
    assert {"comparison.md", "comparison.png", "tensorboard", "config.yaml"} <= {p.name for p in out.iterdir()}


def test_every_verdict_is_the_graders(out):
    assert evaluate(out) == 0
    found = samples(out)
    assert len(found) == 2 * 20 * 4
    for one in found:
        assert one["right"] == (one["response"].strip() == one["answer"])
        assert one["tokens"] <= 8
        assert one["tokens"] == 8 or not one["truncated"]


def test_a_killed_evaluation_goes_on_with_the_same_samples(tmp_path, monkeypatch):
    """After any number of batches, in the middle of a line; nothing is sampled twice."""
    assert evaluate(tmp_path / "whole") == 0
    wanted, add, generate = samples(tmp_path / "whole"), EvalFolder.add, NativeEngine.generate
    for batches in (0, 1, 5):
        calls, sampled = [], []

        def stop(self, found, calls=calls, batches=batches):
            calls.append(1)
            if len(calls) > batches:
                raise RuntimeError("killed")
            add(self, found)

        def count(self, prompts, sampled=sampled, **kwargs):
            sampled.extend(prompts.positions)
            return generate(self, prompts, **kwargs)

        out = tmp_path / str(batches)
        monkeypatch.setattr(EvalFolder, "add", stop)
        with pytest.raises(RuntimeError, match="killed"):
            evaluate(out)
        with (out / "samples.jsonl").open("a") as file:
            file.write('{"model": "student", "benchm')
        monkeypatch.setattr(EvalFolder, "add", add)
        monkeypatch.setattr(NativeEngine, "generate", count)
        assert evaluate(out) == 0
        monkeypatch.setattr(NativeEngine, "generate", generate)
        assert samples(out) == wanted
        assert len(sampled) == 40 - min(6 * batches, 20) - max(0, 6 * (batches - 4))


def test_a_kill_in_the_middle_of_a_problem_leaves_no_sample_twice(tmp_path):
    assert evaluate(tmp_path / "whole") == 0
    assert evaluate(tmp_path / "cut") == 0
    path = tmp_path / "cut" / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: 4 * 9 + 2]))  # nine problems, and half of another one
    assert evaluate(tmp_path / "cut") == 0
    assert samples(tmp_path / "cut") == samples(tmp_path / "whole")


def test_an_interruption_says_how_it_goes_on(out, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(NativeEngine, "generate", interrupt)
    assert evaluate(out) == 130
    assert "the same command continues from there" in capsys.readouterr().err


def test_models_may_be_added_but_nothing_else_may_change(out, capsys):
    assert evaluate(out, models={"student": "tiny/student"}) == 0
    before = samples(out)
    assert evaluate(out, problems_per_batch=20) == 0
    assert [one for one in samples(out) if one["model"] == "student"] == before
    for changes in ({"seed": 1}, {"samples_per_problem": 2}, {"rollout.temperature": 0.5}, {"max_new_tokens": 7}):
        assert evaluate(out, **changes) == 2
        assert f"holds samples of another evaluation: {next(iter(changes)).split('.')[0]} differ" in (
            capsys.readouterr().err
        )
    assert evaluate(out, models={"student": "tiny/teacher"}) == 2
    assert "models.student differ" in capsys.readouterr().err


def fails_later(response, answer):
    """Fails on the second rank, after some responses."""
    fails_later.left -= dist.is_initialized() and dist.get_rank() == 1
    if fails_later.left < 0:
        raise KeyError("boom")
    return response.strip() == answer


def on_two_ranks(rank, folder):
    assert evaluate(folder / "two") == 0
    out, own = folder / "failing", {"grader": f"{__name__}.fails_later"}
    fails_later.left = 40
    assert evaluate(out, **own) == 1
    dist.barrier()  # the first rank writes
    assert 0 < len(samples(out)) < 2 * 20 * 4
    fails_later.left = 1000
    assert evaluate(out, **own) == 0
    dist.barrier()
    assert samples(out) == samples(folder / "two")


def test_two_processes_share_the_problems_and_have_the_samples_of_one(tmp_path):
    assert evaluate(tmp_path / "one") == 0
    run_ranks(on_two_ranks, 2, tmp_path / "ranks", tmp_path)
    assert samples(tmp_path / "two") == samples(tmp_path / "one")


def test_greedy_answers_are_all_the_same(out):
    assert evaluate(out, **{"rollout.temperature": 0}) == 0
    by_problem = {}
    for one in samples(out):
        by_problem.setdefault((one["model"], one["problem"]), set()).add(one["response"])
    assert all(len(responses) == 1 for responses in by_problem.values())


def test_a_profile_says_how_to_ask(out, tmp_path):
    cfg = load_config("tiny/eval", output_dir=out, **SMALL, profile="greedy")
    del cfg.samples_per_problem, cfg.rollout
    assert launch(recipe_class(NAME), cfg) == 0
    assert len(samples(out)) == 2 * 20
    assert evaluate(tmp_path / "same", samples_per_problem=1, **{"rollout.temperature": 0}) == 0
    assert samples(tmp_path / "same") == samples(out)


def test_variables_of_the_chat_template_reach_every_model(out, tmp_path, capsys):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if thinks is defined and not thinks %}+{% endif %}"
    folder = shutil.copytree(find_folder("x", "tiny/student"), tmp_path / "chats")
    (folder / "chat_template.jinja").write_text(template)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "12", "answer": "3"}\n')
    cfg = load_config("tiny/eval", output_dir=out, chat_template_kwargs="{thinks: false}")
    cfg.models, cfg.benchmarks = {"mine": str(folder)}, {"rows": {"source": str(tmp_path / "rows.jsonl")}}
    cfg.benchmarks.rows.answer_column = "answer"
    assert launch(recipe_class(NAME), cfg) == 0
    assert {one["prompt"] for one in samples(out)} == {"12+"}
    cfg.output_dir, cfg.chat_template_kwargs = str(tmp_path / "other"), {"thinking": False}
    assert launch(recipe_class(NAME), cfg) == 2
    assert "models.mine: chat_template_kwargs: the chat template has no variable thinking; it has thinks" in (
        capsys.readouterr().err
    )


def test_a_model_that_only_transformers_has_is_evaluated_too(out, tmp_path):
    folder = tmp_path / "gemma"
    save_model(folder, "gemma3", vocab_size=len(SYMBOLS), max_position_embeddings=MAX_SEQ_LEN)
    write_tokenizer(folder)
    assert evaluate(out, models={"student": "tiny/student", "gemma": str(folder)}) == 0
    assert "gemma_avg_at_k" in json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"models": {}}, "models is empty; name at least one"),
        ({"models": {"me": "./nowhere"}}, "models.me: there is no folder ./nowhere"),
        ({"models": {"a b": "tiny/student"}}, "models has the name 'a b'"),
        ({"max_new_tokens": 500}, "they exceed the context of 128"),
        ({"grader": "nowhere.grade"}, "grader 'nowhere.grade' cannot be found"),
        ({"benchmarks": "null"}, "the config lacks benchmarks"),
        ({"samples_per_problem": 0}, "samples_per_problem is 0; it must be a whole number, at least 1"),
        ({"rollout.temperature": -1}, "rollout.temperature is -1"),
        ({"profile": "papers"}, "profile is 'papers'; allowed are paper, greedy"),
        ({"models.student": "null"}, "models.student is null; '~models.student' takes a model away"),
        ({"chat_template_kwargs": "thinks"}, "chat_template_kwargs is 'thinks'; it must be a section of names and"),
        ({"chat_template_kwargs": "{a: 1}"}, "models.student: chat_template_kwargs is given, but the folder has no"),
    ],
)
def test_mistakes_are_explained_before_a_model_is_loaded(overrides, message, out, capsys):
    assert evaluate(out, **overrides) == 2
    assert message in capsys.readouterr().err
    assert not (out / "samples.jsonl").exists()


def test_the_folder_of_a_training_run_is_refused(out, capsys):
    (out / "checkpoints").mkdir(parents=True)
    assert evaluate(out) == 2
    assert "holds a training run; give another folder" in capsys.readouterr().err
