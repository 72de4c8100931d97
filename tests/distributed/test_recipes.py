"""The recipes sharded over 1, 2 and 4 gloo ranks against one process that shards nothing, on the same rollouts."""

import json

import pytest
from torch.distributed.fsdp import FSDPModule

from oprd_tune.modeling.sharding import Sharding
from oprd_tune.training import student
from tests.conftest import ENDED, load_config, recipe_class
from tests.distributed.spawn import run_ranks

STEPS = 4
COMPONENTS = "tests.distributed.components"
BASE = {
    "max_steps": STEPS,
    "prompts_per_step": 24,
    "dataset.count": 200,
    "eval_dataset": "null",
    "task_accuracy": "null",
    "reference_perplexity": "null",
    "diagnostics_every_n_steps": 3,
    "diagnostics_tokens": 10_000,
    "metric_logger._component_": f"{COMPONENTS}.JSONLogger",
}
CONFIGS = {
    "oprd": "tiny/oprd",
    "opd_topk": "tiny/opd_topk",
    "composite": "tiny/oprd_plus_opd",
}
LORA = {"lora.rank": 4}
TOLD = {"teacher": "student", "dataset.teacher_prompt_template": "'{answer}={prompt}'"}
LIVE = {**TOLD, "teacher_weights": "live"}
FOLLOWS = {**TOLD, "teacher_weights.ema": 0.5}
TWO = {
    **{"teacher": "null", "teachers.addition": "tiny/teacher", "teachers.reversal": "tiny/reversing_teacher"},
    "dataset._component_": "oprd_tune.tiny.two_tasks",
}
# Name: (which twin's rollouts, overrides of the sharded run).
VARIANTS = {
    "oprd": ("oprd", {}),
    "opd_topk": ("opd_topk", {}),
    "composite": ("composite", {}),
    "checkpointed": ("oprd", {"activation_checkpointing": "true"}),
    "every second block checkpointed": ("opd_topk", {"activation_checkpointing": 2}),
    "replicated teacher": ("oprd", {"teacher_placement": "replicated"}),
    "offloaded teacher": ("oprd", {"teacher_placement": "offloaded"}),
    "uneven microbatches": ("opd_topk", {"tokens_per_micro_batch": 20}),
    "uneven microbatches, synced": ("oprd", {"tokens_per_micro_batch": 20, "sync_every_micro_batch": "true"}),
    "gathered blocks kept": ("oprd", {"fsdp_reshard_after_forward": "false"}),
    "compiled": ("oprd", {"compile": "true", "activation_checkpointing": "true"}),
    "lora": ("lora", LORA),
    "dora": ("dora", {**LORA, "lora.use_dora": "true"}),
    "responses weigh the same": ("responses", {"average_over": "responses", "tokens_per_micro_batch": 40}),
    "truncated": ("truncated", {"layers": "[1,3]"}),
    "the student teaches": ("live", {"teacher_placement": "replicated"}),
    "the teacher follows": ("follows", {}),
    "the teacher follows, replicated": ("follows", {"teacher_placement": "replicated"}),
    "two teachers": ("two", {}),
    "two teachers, uneven microbatches": ("two", {"tokens_per_micro_batch": 20, "teacher_placement": "replicated"}),
    "embedding frozen": ("frozen", {"freeze_embedding": "true"}),
}
# Twins with an objective of their own.
TWINS = {
    **{name: (config, {}) for name, config in CONFIGS.items()},
    "lora": ("tiny/oprd", LORA),
    "dora": ("tiny/oprd", {**LORA, "lora.use_dora": "true"}),
    "responses": ("tiny/oprd_plus_opd", {"average_over": "responses"}),
    "truncated": ("tiny/oprd", {"layers": "[1,3]"}),
    "live": ("tiny/oprd_plus_opd", LIVE),
    "follows": ("tiny/oprd_plus_opd", FOLLOWS),
    "two": ("tiny/oprd_plus_opd", TWO),
    "frozen": ("tiny/opd_topk", {"freeze_embedding": "true"}),
}


def run(config, folder, *, sharded, **overrides):
    """Run a recipe as one of its ranks."""
    cfg = load_config(config, output_dir=folder, **{**BASE, **overrides})
    trainer = recipe_class(cfg.recipe)(cfg)
    trainer.setup()
    assert any(isinstance(module, FSDPModule) for module in trainer.student.model.modules()) == sharded
    assert trainer.train() in ENDED


def run_variants(rank, folder, world_size, names):
    if world_size == 1:  # which left to itself would not shard
        student.choose_sharding = lambda settings, ranks: Sharding(ranks, compute_dtype=settings.torch_dtype)
    for name in names:
        twin, overrides = VARIANTS[name]
        config = TWINS[twin][0]
        replay = {
            "rollout._component_": f"{COMPONENTS}.ReplayingEngine",
            "rollout.record": folder / twin / "rollouts",
            "rollout.temperature": 1.0,
        }
        settings = {"teacher_placement": "sharded", **replay, **TWINS[twin][1], **overrides}
        run(config, folder / f"{name} on {world_size}", sharded=True, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs are: the twins', whose rollouts are kept, and the ranks', which replay them."""
    folder = tmp_path_factory.mktemp("runs")
    for twin, (config, overrides) in TWINS.items():
        record = {
            "rollout._component_": f"{COMPONENTS}.RecordingEngine",
            "rollout.record": folder / twin / "rollouts",
            "rollout.temperature": 1.0,
        }
        run(config, folder / twin, sharded=False, **record, **overrides)
    run_ranks(run_variants, 1, folder / "1", folder, 1, ["oprd", "opd_topk"])
    run_ranks(run_variants, 2, folder / "2", folder, 2, list(VARIANTS))
    run_ranks(run_variants, 4, folder / "4", folder, 4, ["oprd", "opd_topk"])
    return folder


def logged(folder):
    """The metrics of each step; evaluations have lines of their own."""
    lines = [json.loads(line) for line in (folder / "tensorboard" / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/total" in line]


@pytest.mark.parametrize(
    ("name", "world_size"),
    [(name, 2) for name in VARIANTS] + [(name, ranks) for name in ("oprd", "opd_topk") for ranks in (1, 4)],
)
def test_ranks_follow_their_twin_of_one_process(folder, name, world_size):
    alone, together = logged(folder / VARIANTS[name][0]), logged(folder / f"{name} on {world_size}")
    compared = ["layers", "positions", "rollout", "token", "head", "loss", "teachers", "diagnostics"]
    if "tokens_per_micro_batch" in VARIANTS[name][1]:
        compared.pop()  # of which only a few responses fit
    assert len(alone) == len(together) == STEPS
    assert "diagnostics/kl" in alone[2]
    for step, (a, b) in enumerate(zip(alone, together, strict=True)):
        grown = 1 if step < STEPS // 2 else 5  # rounding, which training amplifies
        assert b["loss/total"] == pytest.approx(a["loss/total"], rel=grown * 1e-6)
        assert b["optimizer/grad_norm"] == pytest.approx(a["optimizer/grad_norm"], rel=grown * 1e-5)
        same = [key for key in a if key.split("/")[0] in compared]
        assert {k: b[k] for k in same} == pytest.approx({k: a[k] for k in same}, rel=grown * 1e-5, abs=1e-7)
    assert alone[-1]["loss/total"] != alone[0]["loss/total"]
    assert ("teachers/reversal/loss" in together[0]) == name.startswith("two teachers")
