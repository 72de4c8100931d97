"""Metrics of several ranks, which need not add the same ones."""

from dataclasses import replace

import pytest
import torch

from oprd_tune.metrics.step import Metrics, rollout_metrics
from oprd_tune.ranks import Ranks
from tests.distributed.spawn import run_ranks
from tests.losses.test_composite import rollout


def reduce(rank):
    ranks, metrics = Ranks(rank, 2), Metrics()
    metrics.add("both", torch.tensor(3.0 + rank), 1 + 2 * rank)
    metrics.add("nothing", 0.0, 0)
    if rank == 0:
        metrics.add_each("first's own", torch.tensor([1.0, 2.0]))
    else:
        metrics.add_each("second's own", torch.tensor([5.0]))
        metrics.add("nothing on the first", 4.0, 2)
        metrics.set("second's value", 7.0)
    metrics.add("nothing on the first", 0.0, 0)
    metrics.set("value", 10.0 + rank)
    wanted = {"both": 7 / 4, "first's own": 1.5, "second's own": 5.0, "nothing on the first": 2.0}
    wanted |= {"value": 10.0, "second's value": 7.0}
    reduced = metrics.reduce(ranks)
    assert reduced == metrics.reduce(ranks) == wanted
    assert ranks.collect(list(reduced)) == [list(reduced)] * 2  # in one order, as loggers show them
    assert Metrics().reduce(ranks) == {}

    whole = rollout()
    whole = replace(whole, sampler_logprobs_BS=whole.sampler_logprobs_BS * whole.response_mask_BS)
    own = rollout_metrics(whole.rows(torch.tensor([rank])))
    assert own.reduce(ranks) == pytest.approx(rollout_metrics(whole).reduce(Ranks()))


def test_ranks_that_add_different_names_get_them_all(tmp_path):
    run_ranks(reduce, 2, tmp_path)
