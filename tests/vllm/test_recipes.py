"""Recipes with vLLM end to end: they learn as with the native engine, and survive, or not, as the docs say."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oprd_tune.registry import config_files, recipe_files
from oprd_tune.rollout.vllm.policy_weights import PolicyWeights
from oprd_tune.rollout.vllm.server_process import ServerProcess
from oprd_tune.rollout.vllm.weight_transfer import FolderTransfer
from oprd_tune.run.launcher import run_recipe as launch
from tests.conftest import ENDED, SMALL, load_config, recipe_class, weights
from tests.vllm.students import make_student
from tests.vllm.test_server import ENVIRONMENT

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow
NAME, CONFIG = "oprd_distributed", "tiny/oprd"
STEADY = {**SMALL, "lr_scheduler._component_": "oprd_tune.training.constant_with_warmup"}


def run(out, recipe=NAME, config=CONFIG, **overrides):
    """A recipe in a process of its own, which vLLM may do with what it likes."""
    words = [f"{key}={value}" for key, value in {"output_dir": out, **overrides}.items()]
    command = [sys.executable, str(recipe_files()[recipe]), "--config", str(config_files()[config]), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# What the native engine's own quick test asks for.
LEAST = 0.35
SHORT = {"max_steps": 60, "optimizer.lr": 4e-3, "dataset.count": 5000, "evaluate_every_n_steps": 60}


@pytest.mark.long
def test_closes_the_gap_as_with_the_native_engine(out):
    done = run(out, **{"rollout._component_": "oprd_tune.rollout.VLLMColocated", "rollout.kv_cache_gib": 0.25}, **SHORT)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["gap_closed"] >= LEAST
    assert 0 < summary["max_logprob_gap"] < 1e-3
    assert "largest gap of sampler and trainer" in done.stdout


@pytest.mark.long
def test_answers_to_benchmarks_are_sampled_by_vllm_and_leave_training_alone(out, tmp_path):
    vllm = {"rollout._component_": "oprd_tune.rollout.VLLMColocated", "rollout.kv_cache_gib": 0.25}
    held_out = {"_component_": "oprd_tune.tiny.addition", "split": "held_out", "count": 12}
    own = {f"eval.benchmarks.sums.{key}": value for key, value in held_out.items()}
    own |= {"eval.grader": "oprd_tune.grading.exact_match", "eval.max_new_tokens": 40, "eval.every_n_steps": 2}
    for folder, extra in ((out, own), (tmp_path / "without", {})):
        done = run(folder, **STEADY, **vllm, **extra)
        assert done.returncode in ENDED, done.stderr
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, tmp_path / "without")
    ]
    losses = [[line["loss/total"] for line in own if "loss/total" in line] for own in lines]
    assert losses[0] == losses[1]
    assert [line["step"] for line in lines[0] if "eval/sums/avg_at_k" in line] == [0, 2, 4]
    answers = [json.loads(line) for line in (out / "eval_samples.jsonl").read_text().splitlines()]
    assert len(answers) == 3 * 12 * 4


@pytest.mark.long
def test_auto_takes_vllm_and_a_resumed_run_keeps_it(out):
    extra = {"dtype": "bf16", "master_dtype": "fp32"}
    recipe, config = "opd_topk_distributed", "tiny/opd_topk"
    auto = {**STEADY, **extra, "rollout": "auto", "teacher_placement": "sharded"}
    first = run(out, recipe, config, **{**auto, "max_steps": 2})
    assert first.returncode in ENDED, first.stderr
    assert "rollout: VLLMColocated, since vLLM works here" in first.stdout
    second = run(out, recipe, config, **auto, resume="true")
    assert second.returncode in ENDED, second.stderr
    assert "rollout: VLLMColocated, as before" in second.stdout
    assert json.loads((out / "summary.json").read_text())["max_logprob_gap"] < 1e-1


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Three servers, to be killed."""
    folder = tmp_path_factory.mktemp("servers")
    student = make_student("tied", folder / "student")
    start = FolderTransfer(PolicyWeights(student), folder).write_start()
    arguments = ["--dtype", "float32", "--max-model-len", "24", "--generation-config", "vllm", "--enforce-eager"]
    arguments += ["--skip-tokenizer-init", "--enable-scale-out", "--kv-cache-memory-bytes", str(2**27)]
    processes = [ServerProcess(start, arguments, ENVIRONMENT, folder / f"{i}.log") for i in range(3)]
    for process in processes:
        process.wait_until_ready(120)
    yield processes
    for process in processes:
        process.close()


def test_one_step_ahead(servers, tmp_path, capsys):
    """Weights, versions and prompts are those of one step before, and the checkpoint has what was sampled already."""
    sampled = []

    def train(out, **extra):
        cfg = load_config(CONFIG, output_dir=tmp_path / out, **{**STEADY, "checkpoint_every_n_steps": 1, **extra})
        cfg.rollout = {"_component_": "oprd_tune.rollout.VLLMServer", "ahead": 1}
        cfg.rollout.addresses = [server.address for server in servers[:2]]
        recipe = recipe_class(NAME)(cfg)
        recipe.setup()
        sample = recipe.run.sample
        recipe.run.sample = lambda prompts: sampled.append(sample(prompts)) or sampled[-1]
        assert recipe.train() in ENDED
        seen = [(int(rollout.prompt_positions_B[0]), rollout.policy_version) for rollout in sampled]
        return [sampled.pop(0) for _ in seen], seen

    whole, seen = train("whole", keep_checkpoints=4)
    assert seen == [(0, 0), (4, 0), (8, 1), (12, 2)]
    assert all(0 < rollout.logprob_gap.largest < 1e-3 for rollout in whole)
    (tmp_path / "killed" / "checkpoints").mkdir(parents=True)
    place = Path("checkpoints") / "step_00000002"
    shutil.copytree(tmp_path / "whole" / place, tmp_path / "killed" / place)
    again, seen = train("killed", resume="true")
    assert seen == [(8, 1), (12, 2)]
    assert torch.equal(again[0].tokens_BS, whole[2].tokens_BS)
    assert torch.equal(again[0].sampler_logprobs_BS, whole[2].sampler_logprobs_BS)


def test_killed_servers(servers, tmp_path, capsys, monkeypatch):
    """In the middle of a batch, at a sync, and between the two."""
    first, second, third = servers

    def train(out, *left, moments="", **extra):
        monkeypatch.setenv("MOMENTS", moments)
        record = tmp_path / f"{out}.txt"
        overrides = {"output_dir": tmp_path / out, **STEADY, "checkpoint_every_n_steps": 4, **extra}
        overrides["rollout._component_"] = "tests.vllm.components.FragileServer"
        cfg = load_config(CONFIG, **overrides)
        cfg.rollout.addresses = [server.address for server in left]
        cfg.rollout.record = str(record)
        status = launch(recipe_class(NAME), cfg)
        steps = record.read_text().splitlines()
        record.unlink()  # a resumed run begins another one
        return status, steps, capsys.readouterr().err

    def saved(out):
        return [path.name for path in sorted((tmp_path / out / "checkpoints").iterdir())]

    status, whole, _ = train("whole", third)
    assert status in ENDED
    assert [line.split()[:2] for line in whole] == [[str(step)] * 2 for step in range(4)]

    status, steps, said = train("batch", first, second, moments=f"batch 1 {first.pid}")
    assert status in ENDED
    assert steps == whole
    assert f"{first.address} was lost: no connection" in said
    assert said.count("1 left") == 1

    status, steps, said = train("sync", second, moments=f"sync 2 {second.pid}")
    assert (status, steps) == (1, whole[:2])
    assert "error: no vLLM server is left" in said
    assert "resume=true goes on from there" in said
    assert saved("sync") == ["step_00000002"]
    status, steps, _ = train("sync", third, resume="true")
    assert status in ENDED
    assert steps == whole[2:]

    status, steps, said = train("between", third, moments=f"between 3 {third.pid}")
    assert (status, steps) == (1, whole[:3])
    assert "error: no vLLM server is left" in said
    assert saved("between") == ["step_00000003"]

    reference = weights(tmp_path / "whole" / "final")
    for out in ("batch", "sync"):
        for name, weight in weights(tmp_path / out / "final").items():
            torch.testing.assert_close(weight, reference[name], rtol=0, atol=2e-3)
