"""A bridge on several ranks: moments merged, pairs solved in turn, one result; and the run that follows."""

import json

import pytest
import torch
from safetensors.torch import load_file

from oprd_tune.modeling.bridge import Bridge
from oprd_tune.modeling.moments import Covariance, PairMoments
from oprd_tune.modeling.projectors import BASES, HeldOut, fit_projectors, share_projectors
from oprd_tune.ranks import Ranks
from oprd_tune.training.bridge_fit import FILE
from tests.conftest import ENDED, load_config, recipe_class
from tests.distributed.spawn import run_ranks

CPU = torch.device("cpu")
A, B, STEPS = 5, 3, 4
# Which of 50 rows each rank has, by world size.
SHARES = {2: [(0, 13), (13, 50)], 3: [(0, 7), (7, 7), (7, 50)]}
COMPONENTS = "tests.distributed.components"
QUICK = {
    "max_steps": STEPS,
    "prompts_per_step": 24,
    "dataset.count": 400,
    "eval_dataset": "null",
    "task_accuracy": "null",
    "reference_perplexity": "null",
    "metric_logger._component_": f"{COMPONENTS}.JSONLogger",
    "bridge.prompts": 240,
    "bridge.held_out_prompts": 48,
    "bridge.rank": 8,
}
VARIANTS = {
    "pca": {"bridge.basis": "pca"},
    "predictive": {
        "bridge.basis": "predictive",
        "bridge.moments_dtype": "fp64",
        "bridge.ridge": 1e-2,
        "tokens_per_micro_batch": 60,
        "teacher_placement": "sharded",
    },
}


def paired_rows(mean, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, A, generator=generator, dtype=torch.float64)
    b = a[:, :B] + torch.randn(50, B, generator=generator, dtype=torch.float64) + a[:, 1 : B + 1] ** 2
    drift = torch.linspace(0, 3, 50, dtype=torch.float64)[:, None]
    return (a + drift + mean).to(dtype), (b - drift - 3 * mean).to(dtype)


def check_covariance(rank, world_size, dtype, mean, *, of_means, of_products):
    a, b = paired_rows(mean, dtype)
    start, end = SHARES[world_size][rank]
    covariance = Covariance(A, B, dtype=dtype, device=CPU)
    for cut in (slice(start, (start + end) // 2), slice((start + end) // 2, end)):
        covariance.add(a[cut], b[cut])
    covariance.merge(Ranks(rank, world_size))
    a, b = a.double(), b.double()
    expected = (a - a.mean(0)).T @ (b - b.mean(0)) / 50
    assert covariance.count == 50
    torch.testing.assert_close(covariance.mean_A.double(), a.mean(0), rtol=of_means, atol=0)
    torch.testing.assert_close(covariance.mean_B.double(), b.mean(0), rtol=of_means, atol=0)
    torch.testing.assert_close(covariance.matrix_AB(CPU), expected, rtol=0, atol=of_products)
    assert_same_everywhere(rank, world_size, [covariance.scatter_AB, covariance.mean_A, covariance.mean_B])


def assert_same_everywhere(rank, world_size, tensors):
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    assert all(torch.equal(flat, other) for other in Ranks(rank, world_size).gather(flat))


def check_fits(rank, world_size):
    """Every rank has the fit of all rows, whoever has solved it."""
    ranks, (a, b) = Ranks(rank, world_size), paired_rows(1.0)
    start, end = SHARES[world_size][rank]
    for owner, basis in enumerate(BASES):
        moments = PairMoments(A, B, outcome_width=B, dtype=torch.float32, device=CPU)
        moments.add(a[start:end], b[start:end], b[start:end] ** 2)
        moments.merge(ranks)
        owner %= world_size
        own = fit_projectors(moments, basis=basis) if rank == owner else None
        fit = share_projectors(own, moments, owner, ranks)
        assert_same_everywhere(rank, world_size, vars(fit).values())
        whole = PairMoments(A, B, outcome_width=B, dtype=torch.float64, device=CPU)
        whole.add(a, b, b**2)
        alone = fit_projectors(whole, basis=basis)
        for name, tensor in vars(fit).items():
            torch.testing.assert_close(tensor.double(), getattr(alone, name), rtol=1e-4, atol=1e-4)

        check, everything = HeldOut({4: alone}, 2), HeldOut({4: alone}, 2)
        check.add(4, a[start:end], b[start:end])
        everything.add(4, a, b)
        (found, expected) = (held.report(r)[4] for held, r in ((check, ranks), (everything, Ranks())))
        assert found.cosine_by_rank == pytest.approx(expected.cosine_by_rank, rel=1e-9)
        assert found.r_squared_by_rank == pytest.approx(expected.r_squared_by_rank, rel=1e-9)
        assert ranks.collect(found) == [found] * world_size


def check_pieces(rank, world_size):
    check_covariance(rank, world_size, torch.float64, 2.0, of_means=1e-13, of_products=1e-12)
    check_covariance(rank, world_size, torch.float32, 1e4, of_means=1e-6, of_products=5e-3)
    check_fits(rank, world_size)


def run(folder, **overrides):
    cfg = load_config("tiny/bridge", output_dir=folder, **{**QUICK, **overrides})
    trainer = recipe_class(cfg.recipe)(cfg)
    trainer.setup()
    assert trainer.train() in ENDED
    return trainer


def run_everything(rank, folder):
    check_pieces(rank, 2)
    for name, overrides in VARIANTS.items():
        replay = {
            "rollout._component_": f"{COMPONENTS}.ReplayingEngine",
            "rollout.record": folder / f"{name}, rollouts",
        }
        trainer = run(folder / f"{name} on 2", **replay, **overrides, **{"rollout.temperature": 1.0})
        layers = trainer.teachers[0].bridge._layers
        assert_same_everywhere(rank, 2, [tensor for own in layers.values() for tensor in vars(own).values()])
        saved = load_file(folder / f"{name} on 2" / FILE)
        for layer, own in layers.items():
            assert all(torch.equal(saved[f"layers.{layer}.{key}"], tensor) for key, tensor in vars(own).items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs are: those of one process, whose rollouts are kept, and those of two, which replay them."""
    folder = tmp_path_factory.mktemp("runs")
    for name, overrides in VARIANTS.items():
        record = {
            "rollout._component_": f"{COMPONENTS}.RecordingEngine",
            "rollout.record": folder / f"{name}, rollouts",
            "rollout.temperature": 1.0,
        }
        run(folder / name, **{**overrides, "teacher_placement": "replicated"}, **record)
    run_ranks(run_everything, 2, folder / "2", folder)
    return folder


def test_three_uneven_ranks_together_have_the_moments_and_fits_of_all_rows(tmp_path):
    run_ranks(check_pieces, 3, tmp_path / "ranks", 3)


def logged(folder):
    lines = [json.loads(line) for line in (folder / "tensorboard" / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/total" in line]


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_fit_the_bridge_of_one_process_and_follow_its_losses(folder, name):
    alone, together = (load_file(folder / run / FILE) for run in (name, f"{name} on 2"))
    assert alone.keys() == together.keys()
    for key, tensor in alone.items():
        assert (together[key] - tensor).norm() <= 1e-4 * tensor.norm(), key
    one, other = (Bridge.load(folder / run / FILE, device=CPU) for run in (name, f"{name} on 2"))
    for layer, fit in one.report.items():
        assert other.report[layer].cosine == pytest.approx(fit.cosine, rel=1e-4)
        assert other.report[layer].held_out_r_squared == pytest.approx(fit.held_out_r_squared, rel=1e-3)
    assert (one.pairs, one.plan, one.belongs) == (other.pairs, other.plan, other.belongs)
    losses = [[line["loss/total"] for line in logged(folder / run)] for run in (name, f"{name} on 2")]
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] != losses[0][0]
