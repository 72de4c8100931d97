"""Rollouts one step ahead: which weights sample them, and that nothing of them is lost."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch

from oprd_tune.data.stream import PromptStream
from oprd_tune.errors import RolloutError
from oprd_tune.ranks import Ranks
from oprd_tune.rollout import NativeEngine
from oprd_tune.rollout.responses import Response, pack_responses
from oprd_tune.run.launcher import run_recipe as launch
from oprd_tune.run.rollouts import Rollouts
from oprd_tune.types import Prompts
from tests.conftest import ENDED, SMALL, load_config, recipe_class, weights

CONSTANT = {"lr_scheduler._component_": "oprd_tune.training.constant_with_warmup", "checkpoint_every_n_steps": 1}


@dataclass(kw_only=True, eq=False)
class AskedAhead(NativeEngine):
    """The native engine with the interface of one that samples ahead."""

    ahead: int = 1

    def __post_init__(self):
        super().__post_init__()
        self.pending = None

    def ask(self, prompts, *, stream):
        self.pending = self.generate(prompts, stream=stream)

    def prove(self): ...

    def take(self):
        taken, self.pending = self.pending, None
        return taken


AHEAD = {"rollout._component_": f"{__name__}.AskedAhead", "rollout.ahead": 1, **CONSTANT}


def versions(folder):
    """The policy version of each step's rollout, as `watch` noted them."""
    return [tuple(map(int, line.split())) for line in (folder / "versions.txt").read_text().splitlines()]


def watched(cfg, folder):
    """A recipe that notes step and policy version of what it samples."""
    recipe = recipe_class(cfg.recipe)(cfg)
    recipe.setup()
    sample = recipe.run.sample

    def noting(prompts):
        rollout = sample(prompts)
        with (folder / "versions.txt").open("a") as file:
            file.write(f"{recipe.run.step} {rollout.policy_version}\n")
        return rollout

    recipe.run.sample = noting
    return recipe


def run(folder, config="tiny/oprd", **overrides):
    cfg = load_config(config, output_dir=folder / "out", **{**SMALL, **AHEAD, **overrides})
    status = watched(cfg, folder).train()
    assert status in ENDED
    return folder / "out"


def test_every_step_but_the_first_learns_from_the_policy_before(tmp_path):
    eval_section = {"eval.benchmarks.sums._component_": "oprd_tune.tiny.addition", "eval.every_n_steps": 1}
    eval_section |= {"eval.benchmarks.sums.count": 4, "eval.benchmarks.sums.split": "held_out"}
    eval_section |= {
        "eval.grader": "oprd_tune.grading.exact_match",
        "eval.max_new_tokens": 8,
        "eval.samples_per_problem": 1,
    }
    out = run(tmp_path, **eval_section)  # which syncs in between
    assert versions(tmp_path) == [(0, 0), (1, 0), (2, 1), (3, 2)]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss/total" in row]
    assert "time/rollout" in steps[0]
    assert all("time/wait" in row and "speed/rollout" not in row for row in steps[1:])


def test_a_resumed_run_learns_from_what_was_sampled_before(tmp_path):
    (tmp_path / "killed").mkdir()
    whole = run(tmp_path, keep_checkpoints=9)
    killed = tmp_path / "killed" / "out"
    (killed / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step_00000002", killed / "checkpoints" / "step_00000002")
    run(tmp_path / "killed", resume="true")
    assert versions(tmp_path / "killed") == [(2, 1), (3, 2)]
    wanted = weights(whole / "final")
    assert all(torch.equal(weight, wanted[name]) for name, weight in weights(killed / "final").items())


def test_it_changes_what_is_learned_so_it_may_not_change_on_the_way(tmp_path, capsys):
    run(tmp_path, max_steps=2)
    cfg = load_config("tiny/oprd", output_dir=tmp_path / "out", resume="true", **{**SMALL, **AHEAD, "rollout.ahead": 0})
    assert launch(recipe_class("oprd_distributed"), cfg) == 2
    assert "rollout.ahead: 1 then, 0 now" in capsys.readouterr().err


def test_a_sampled_objective_asks_for_importance_ratios(tmp_path, capsys):
    def status(**overrides):
        cfg = load_config("tiny/vopd", output_dir=tmp_path / "out", **{**SMALL, **AHEAD, **overrides})
        return launch(recipe_class("opd_topk_distributed"), cfg)

    assert status() == 2
    assert "rollout.ahead is 1, so responses are one step old: set loss.importance_ratio_cap" in capsys.readouterr().err


class Stub:
    """An engine that returns what it is given, one step ahead."""

    ahead = 1

    def __init__(self, *taken):
        self.taken, self.asked = list(taken), []

    def sync_weights(self, version): ...

    def prove(self): ...

    def take(self):
        return self.taken.pop(0) if self.taken else None

    def ask(self, prompts, *, stream):
        self.asked.append((prompts.positions, stream))


class Numbers:
    """Prompts of one token."""

    def __len__(self):
        return 100

    def __getitem__(self, index):
        return (3,), None

    def teacher_prompt(self, index):
        return None


def stream(rank=0, world_size=1):
    return PromptStream(Numbers(), prompts_per_step=4, seed=0, rank=rank, world_size=world_size)


def made(engine, prompts=None):
    return Rollouts(engine, prompts or stream(), Ranks(), last=9, phase=lambda name: nullcontext())


def rollout_of(positions, version):
    """A rollout in which the row to prompt p is the token 3 and up to five times p."""
    responses = [torch.full((1 + position % 5,), position) for position in positions]
    return pack_responses(
        Prompts(((3,),) * len(positions), tuple(positions), (None,) * len(positions)),
        [Response(ids_T, -ids_T.float(), ids_T[:, None][:, :0], ids_T.float()) for ids_T in responses],
        samples_per_prompt=1,
        stop_tokens=(1,),
        pad_id=0,
        policy_version=version,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("version", [0, 2, 3])
def test_a_policy_that_is_not_exactly_one_behind_is_named(version):
    prompts = stream().at_step(2)
    with pytest.raises(RolloutError, match=f"step 3 was sampled with policy version {version}; .* has to be version 1"):
        made(Stub(rollout_of(prompts.positions, version))).of_step(2, prompts)
    engine = Stub(rollout_of(prompts.positions, 1))
    assert made(engine).of_step(2, prompts).policy_version == 1
    assert engine.asked == [((12, 13, 14, 15), 3)]


def test_other_prompts_are_refused():
    with pytest.raises(RolloutError, match="has sampled other prompts than those of this step"):
        made(Stub(rollout_of((8, 9, 10, 12), 1))).of_step(2, stream().at_step(2))


def test_ranks_take_their_rows_whoever_has_sampled_them():
    halves = [rollout_of(stream(rank, 2).at_step(2).positions, 1) for rank in (0, 1)]
    saving = made(Stub(halves[0]))
    saving._ranks = type("Two", (), {"collect": lambda self, own: [own, halves[1]]})()
    saving.gather()
    state = saving.state_dict()
    for rank, world_size in ((0, 1), (1, 2), (2, 3)):
        prompts = stream(rank, world_size)
        loading = made(Stub(), prompts)
        loading.load_state_dict(state)
        own = prompts.at_step(2)
        found = loading.of_step(2, own)
        assert found.prompt_positions_B.tolist() == list(own.positions)
        for row, position in enumerate(own.positions):
            length = int(found.lengths_B[row])
            assert length == 2 + position % 5
            assert found.tokens_BS[row, :length].tolist() == [3] + [position] * (length - 1)
        assert found.policy_version == 1


def test_rows_that_nobody_has_sampled_leave_the_step_to_be_sampled_anew():
    saving = made(Stub(rollout_of((10, 11), 1)))
    saving.gather()
    loading = made(Stub())
    loading.load_state_dict(saving.state_dict())
    assert loading._next is None
