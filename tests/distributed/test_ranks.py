"""What only several ranks can get wrong."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from oprd_tune.errors import CheckpointError, ConfigError, RolloutError
from oprd_tune.evaluation.during_training import BenchmarkEval
from oprd_tune.grading.calls import grade_all
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.auto import best_engine
from oprd_tune.run.folder import RunFolder
from oprd_tune.run.folder_lock import FolderLock
from oprd_tune.training.drift import TiedHeadDrift
from tests.conftest import ENDED, SMALL, load_config, make_model, recipe_class
from tests.distributed.spawn import run_ranks


def run(rank, folder):
    """Fewer evaluation prompts than ranks; a layout that keeps gathered blocks; other sizes of the ranks' work."""
    overrides = {**SMALL, "max_steps": 2, "prompts_per_step": 3, "eval_dataset.count": 1}
    overrides["teacher_placement"] = "sharded"
    cfg = load_config("tiny/oprd", output_dir=folder / "one prompt", **overrides)
    recipe = recipe_class("oprd_distributed")(cfg)
    recipe.setup()
    assert recipe.train() in ENDED
    accuracies = [e["accuracy"] for e in recipe.run.journal.history.evaluations]
    assert set(accuracies) <= {0.0, 1.0}
    assert Ranks(rank, 2).collect(accuracies) == [accuracies] * 2

    with pytest.raises(ConfigError, match="each of which needs a prompt"):
        recipe_class("oprd_distributed")(
            load_config("tiny/oprd", output_dir=folder / "few", **{**overrides, "prompts_per_step": 1})
        ).setup()


def check_folder(rank, folder):
    own = RunFolder(str(folder / str(rank)), 1, Ranks(rank, 2))
    if rank == 0:
        assert own.check(resume=False) is None
        return
    with pytest.raises(ConfigError, match="is another folder here than on the first rank's host"):
        own.check(resume=False)
    # The first rank goes on, to the end of this check and to the search for a checkpoint.
    torch.distributed.barrier()
    Ranks(rank, 2).collect(None)


def check_folders(rank, folder, holder):
    """What the first rank finds out about a folder, all ranks are told, so that none waits for the others."""
    ranks = Ranks(rank, 2)
    for resume in (True, False):
        with pytest.raises(ConfigError, match=f"is in use by another run, process {holder} on host"):
            RunFolder(str(folder / "busy"), 1, ranks).check(resume=resume)
    own = RunFolder(str(folder / "full"), 2, ranks)
    assert own.check(resume=False) is None
    own.open({"seed": 0})
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    optimizer.step()
    own.save(1, model, optimizer, {})
    own.wait()
    module = sys.modules["oprd_tune.run.folder"]
    write = module.write_config

    def no_room(*_):
        raise OSError(28, "No space left on device")

    module.write_config = no_room
    own.save(2, model, optimizer, {})
    module.write_config = write
    with pytest.raises(CheckpointError, match="step_00000002 could not be written: .*No space left on device"):
        own.wait()
    own.save(3, model, optimizer, {})
    own.wait()
    ranks.wait()
    newest = own.latest()
    assert newest.name == "step_00000003"
    ranks.wait()
    if rank == 0:
        (newest / "__1_0.distcp").unlink()
    ranks.wait()
    assert RunFolder(str(folder / "full"), 2, ranks).check(resume=True).name == "step_00000001"


def check_numbers(rank):
    ranks = Ranks(rank, 2)
    assert ranks.total([1.0, rank]) == [2.0, 1.0]
    assert ranks.largest(-rank) == 0.0
    assert ranks.collect({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert ranks.gather(torch.tensor([float(rank)])).tolist() == [[0.0], [1.0]]


def check_agreement(rank):
    """What fails on one rank, or on both, fails on both for one reason; then they go on together."""
    ranks = Ranks(rank, 2)

    def act(*failing):
        def action():
            if rank in failing:
                raise RolloutError(f"rank {rank} lost its engine")
            return f"rank {rank}"

        return action

    assert ranks.agree(act()) == f"rank {rank}"
    for failing in ((0,), (1,), (0, 1)):
        with pytest.raises(RolloutError, match=f"^rank {failing[0]} lost its engine$"):
            ranks.agree(act(*failing))
    assert ranks.agree(lambda: None) is None
    assert ranks.collect(rank) == [0, 1]
    with pytest.raises(RolloutError, match="alone"):
        Ranks().agree(lambda: (_ for _ in ()).throw(RolloutError("alone")))


def check_engine(rank):
    """vLLM has to work on all ranks to be the best."""
    for without in ((), (0,), (1,)):

        def import_vllm(device, without=without):
            if rank in without:
                raise ConfigError(f"no vLLM on rank {rank}")

        sys.modules["oprd_tune.rollout.auto"].import_vllm = import_vllm
        wanted = ("oprd_tune.rollout.VLLMColocated", "since vLLM works here")
        if without:
            wanted = ("oprd_tune.rollout.NativeEngine", f"since no vLLM on rank {without[0]}")
        assert best_engine(torch.device("cpu"), Ranks(rank, 2)) == wanted


def check_drift(rank):
    """23 rows over two ranks: the shards are uneven."""
    from oprd_tune.modeling.sharding import Sharding

    model, ranks = make_model(), Ranks(rank, 2)
    whole = model.tok_embeddings.weight.detach().clone()
    Sharding(ranks).rest(model)
    drift = TiedHeadDrift(model, ranks)
    assert torch.equal(drift.state_dict()["start"], whole)
    with torch.no_grad():
        local = model.tok_embeddings.weight.to_local()
        local.mul_(1.25 if rank else 1.0)
    moved = whole.clone()
    moved[12:] *= 1.25
    expected = (torch.dist(moved, whole) / whole.norm()).item()
    assert drift.measure(model) == pytest.approx(expected, rel=1e-5)


def check_grader(rank):
    """One that fails on a rank ends the evaluation on all, in the batch in which it fails."""
    asked = []

    def fails_on_the_second(response, answer):
        if rank == 1:
            raise KeyError("boom")
        return True

    def answers(name, problems, sample, *, model, grader):
        asked.append([*problems])
        return grade_all(grader, [("1", "1")])

    problems, section = SimpleNamespace(sizes={"one": 8}, answers=answers), SimpleNamespace(problems_per_batch=2)
    evaluate = BenchmarkEval(problems, section, fails_on_the_second, Ranks(rank, 2))
    with pytest.raises(RolloutError, match="fails_on_the_second fails on the response '1'.*boom"):
        evaluate(None, "student")
    assert asked == [[rank, rank + 2]]


def check_everything(rank, folder):
    check_grader(rank)
    check_numbers(rank)
    check_agreement(rank)
    check_engine(rank)
    check_drift(rank)
    run(rank, folder)


def test_numbers_drift_and_evaluation_are_those_of_all_ranks(tmp_path):
    run_ranks(check_everything, 2, tmp_path / "ranks", tmp_path)


def test_a_folder_that_cannot_be_used_is_told_to_all_ranks(tmp_path):
    (tmp_path / "busy").mkdir()
    lock = FolderLock(tmp_path / "busy")
    assert lock.take() is None
    run_ranks(check_folders, 2, tmp_path / "ranks", tmp_path, os.getpid())
    lock.release()


def test_hosts_that_see_different_folders_are_told(tmp_path):
    run_ranks(check_folder, 2, tmp_path / "ranks", tmp_path)


PAIRS = """
import os, sys
import torch, torch.distributed as dist
from oprd_tune.ranks import leave_ranks

sys.setswitchinterval(1000)  # threads then get the interpreter only where another one waits
statuses = []
for store in sys.argv[1:]:
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
            kept = dist.group.WORLD
            ones = torch.ones(3)
            for _ in range(5):
                dist.all_reduce(ones)
            leave_ranks(together=True)
            sys.exit()
    statuses += [os.waitpid(child, 0)[1] for child in children]
sys.exit(any(statuses))
"""


def test_a_process_that_leaves_is_not_aborted_by_threads_of_gloo(tmp_path):
    stores = [str(tmp_path / str(pair)) for pair in range(6)]
    done = subprocess.run([sys.executable, "-c", PAIRS, *stores], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
