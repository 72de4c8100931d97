"""What is told before weights are read, and what it is worth."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torchtune.models.llama3_1 import llama3_1
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.config import ONLY_TEACHER, OPRDSettings
from oprd_tune.modeling.families.llama import llama
from oprd_tune.modeling.freezing import freeze
from oprd_tune.modeling.weights import build_on_meta
from oprd_tune.preflight import describe
from oprd_tune.preflight.disk import room
from oprd_tune.preflight.memory import Plan, predict_memory
from oprd_tune.ranks import Ranks
from oprd_tune.run.launcher import run_recipe as launch
from oprd_tune.tiny import checkpointer, lora_tiny_qwen2, tiny_qwen2
from tests.conftest import ENDED, SMALL, load_config, recipe_class

SETTINGS = OPRDSettings(
    output_dir="out", max_steps=1, max_prompt_tokens=1, max_new_tokens=1, dtype="fp32", sync_every_micro_batch=True
)
PLAN = Plan(
    settings=SETTINGS,
    ranks=Ranks(),
    sharded=False,
    token_losses=0,
    rows=3,
    row_tokens=20,
    selected=30,
    tapped=4,
    micro_batches=1,
    logit_bytes=0,
    rollout_bytes=1000,
    engine_bytes=0,
    whole_teacher_bytes=0,
    optimizer_bytes=8.0,
    follows=False,
    teacher_bytes=7000,
    teacher_width=128,
    target_width=128,
)


def predict(build=tiny_qwen2, **changes):
    student = build_on_meta(build)
    freeze(student, top=4, trains_head=False, freeze_embedding=False)
    plan = {name: changes.pop(name) for name in list(changes) if hasattr(PLAN, name)}
    if "world_size" in changes:
        plan["ranks"] = Ranks(world_size=changes.pop("world_size"))
    return predict_memory(student, build, replace(PLAN, settings=replace(SETTINGS, **changes), **plan))


@pytest.mark.parametrize(
    ("recipe", "config"),
    [
        ("oprd_distributed", "tiny/oprd"),
        ("oprd_single_device", "tiny/oprd"),
        ("opd_topk_distributed", "tiny/oprd_plus_opd"),
        ("opd_topk_single_device", "tiny/opd_topk"),
    ],
)
def test_preflight_only_reads_no_weights_and_starts_nothing(recipe, config, out, monkeypatch, capsys):
    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", lambda self: pytest.fail("a model was loaded"))
    cfg = load_config(config, output_dir=out, preflight="only", **SMALL)
    assert launch(recipe_class(recipe), cfg) in ENDED
    told = capsys.readouterr().out
    assert "791k parameters, 4 blocks of width 128, vocabulary 16; 791k of them train" in told
    assert "4 prompts × 1 = 4 responses a step on one process" in told
    assert "at most 32 response tokens a step" in told
    assert "a checkpoint takes 9.0 MiB" in told
    assert [entry.name for entry in out.iterdir()] == ["run.lock"]
    assert not torch.distributed.is_initialized()


def test_an_unknown_preflight_is_refused(out, capsys):
    cfg = load_config("tiny/oprd", output_dir=out, preflight="maybe", **SMALL)
    assert launch(recipe_class("oprd_distributed"), cfg) == 2
    assert "allowed are true, false and only" in capsys.readouterr().err


def test_conventions_that_differ_are_told(tmp_path):
    class Files:
        def __init__(self, name, **changes):
            self._checkpoint_dir = shutil.copytree(
                checkpointer("teacher", str(tmp_path))._checkpoint_dir, tmp_path / name
            )
            path = Path(self._checkpoint_dir) / "tokenizer_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    class Pair:
        name = ONLY_TEACHER
        student_files = Files("student")
        teacher_files = Files("teacher", eos_token="<pad>", chat_template="{{ messages }}")

    assert describe._differing_conventions([Pair]) == [
        ("EOS", "<eos> (student), <pad> (teacher); responses end as `tokenizer` says"),
        ("chat template", "differs between student and teacher; prompts use the one of `tokenizer`"),
    ]
    Pair.teacher_files = Pair.student_files
    assert describe._differing_conventions([Pair]) == []


def test_what_does_not_fit_is_said(out, monkeypatch, capsys):
    monkeypatch.setattr(describe, "_free_bytes", lambda ranks: 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    cfg = load_config("tiny/oprd", output_dir=out, preflight="only", **SMALL)
    assert launch(recipe_class("oprd_distributed"), cfg) in ENDED
    assert capsys.readouterr().out.count("This will not fit") == 2


def test_a_disk_without_room_stops_the_run_before_weights_are_read(out, monkeypatch, capsys):
    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", lambda self: pytest.fail("a model was loaded"))
    usage = shutil._ntuple_diskusage(2**30, 2**30, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    cfg = load_config("tiny/oprd", output_dir=out, **SMALL)
    assert launch(recipe_class("oprd_distributed"), cfg) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"error: what the run writes to {out} will not fit (up to 18.1 MiB of 1.0 MiB free" in told
    assert told.endswith("preflight=false starts all the same")
    monkeypatch.undo()
    (out / "checkpoints" / "step_00000004").mkdir(parents=True)  # of a run that resumes: room that it has already
    (out / "checkpoints" / "step_00000004" / "x").write_bytes(bytes(100))
    assert room(out)[1] == 100


LLAMA = {"vocab_size": 16, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 128}
LLAMA |= {"intermediate_dim": 384, "max_seq_len": 128}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def scaled_llama():
    return llama(**LLAMA, rope_scaling=SCALING)


def torchtunes_llama3_1():
    return llama3_1(**LLAMA)


@pytest.mark.parametrize("build", [tiny_qwen2, lora_tiny_qwen2, scaled_llama, torchtunes_llama3_1])
def test_activations_are_those_that_the_backward_pass_really_keeps(build):
    model, saved = build(), {}
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def count(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    state = torch.randn(3, 20, 128, requires_grad=True)
    with saved_tensors_hooks(count, lambda tensor: tensor):
        kept = model.layers[0](state)
    one = sum(saved.values())
    assert kept.requires_grad
    none, every, second = (predict(build, activation_checkpointing=n).training for n in (0, 1, 2))
    inputs = state.nbytes
    assert none - every == (4 * one) - (4 * inputs + one)
    assert none - second == (4 * one) - (2 * one + 2 * inputs + one)


def test_each_part_counts_once():
    alone, parameters = predict(), sum(p.numel() for p in tiny_qwen2().parameters())
    assert alone.optimizer == 8 * parameters
    assert alone.gradients == 4 * parameters
    assert alone.checkpoint == 12 * parameters
    assert alone.student == pytest.approx(4 * parameters, rel=0.05)  # and the rotary cache
    assert alone.peak == alone.student + alone.optimizer + alone.teacher + max(alone.sampling, alone.training)
    assert predict(rollout_bytes=5000).sampling == alone.sampling + 4000
    assert predict(logit_bytes=7000).training == alone.training + 7000
    assert alone.teacher == 7000
    assert predict(engine_bytes=11).peak == alone.peak + 11


def test_a_bridge_is_fitted_before_the_optimizer_has_a_state():
    alone, bridged = predict(), predict(target_width=8, bridge_bytes=3000, moment_bytes=50_000)
    assert bridged.bridge == 3000
    assert alone.training - bridged.training == (128 - 8) * 4 * PLAN.tapped * PLAN.selected
    whole_states = 4 * 128 * PLAN.tapped * PLAN.selected
    assert bridged.fitting == 50_000 + max(bridged.sampling, whole_states)
    assert bridged.peak == alone.peak - (alone.training - bridged.training) + 3000
    huge = predict(moment_bytes=10**9)
    assert huge.peak == huge.student + huge.teacher + huge.fitting
    assert predict(sharded=True, world_size=4, moment_bytes=10**9).fitting > 10**9
    assert alone.fitting == alone.bridge == 0


def test_ranks_share_what_is_sharded():
    one, four = (predict(sharded=True, world_size=n) for n in (1, 4))
    assert four.optimizer == one.optimizer // 4
    assert four.checkpoint == one.checkpoint // 4
    assert four.student < one.student / 2
    assert four.sampling == one.sampling  # each rank gathers the whole model to sample
    evaluated = predict(sharded=True, world_size=4, whole_teacher_bytes=10**9)
    assert evaluated.sampling == 10**9 + PLAN.rollout_bytes
    deferred = predict(sharded=True, world_size=4, micro_batches=3, sync_every_micro_batch=False)
    each = predict(sharded=True, world_size=4, micro_batches=3, sync_every_micro_batch=True)
    assert deferred.training > each.training
    assert math.isclose(predict(sharded=True, master_dtype="fp32", dtype="bf16").optimizer, one.optimizer)


def plan_of(config, out, monkeypatch, **overrides):
    """What a run is said to need memory for."""
    plans = []
    monkeypatch.setattr(
        "oprd_tune.preflight.report.predict_memory",
        lambda student, build, plan: plans.append(plan) or predict_memory(student, build, plan),
    )
    cfg = load_config(config, output_dir=out, preflight="only", **{**SMALL, **overrides})
    assert launch(recipe_class(cfg.recipe), cfg) in ENDED
    return plans[-1]


def test_several_teachers_add_up(out, monkeypatch):
    two = plan_of("tiny/two_teachers", out, monkeypatch)
    one = plan_of("tiny/oprd", out, monkeypatch, layers="last")
    assert two.teacher_bytes == 2 * one.teacher_bytes > 0


def test_a_teachers_longer_prompts_count_where_it_answers_and_where_it_reads(out, monkeypatch):
    long = "'" + "1" * 100 + "{prompt}'"
    size = {"tokens_per_micro_batch": 256, "prompts_per_step": 32}
    plain = plan_of("tiny/oprd", out, monkeypatch, **size)
    told = plan_of("tiny/oprd", out, monkeypatch, **size, **{"dataset.teacher_prompt_template": long})
    assert told.micro_batches == 4 * plain.micro_batches
    assert 0.7 < told.reading_bytes / plain.reading_bytes < 1.2
    measured = plan_of("tiny/oprd", out, monkeypatch, **size, **{"eval_dataset.teacher_prompt_template": long})
    assert measured.rollout_bytes > 2.5 * plain.rollout_bytes
    unmeasured = plan_of(
        *("tiny/oprd", out, monkeypatch),
        **size,
        **{"eval_dataset.teacher_prompt_template": long},
        evaluate_teacher=False,
    )
    assert unmeasured.rollout_bytes == plain.rollout_bytes
