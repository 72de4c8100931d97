"""Token losses under FSDP2 on two gloo ranks: gradients equal those of one process, the head's own included."""

import pytest
import torch

from oprd_tune.losses import (
    ForwardKL,
    FullReverseKL,
    GeneralisedJSD,
    HiddenStateMSE,
    MixedKL,
    TailedTopKKL,
    TopKMixedKL,
    TopKReverseKL,
)
from oprd_tune.losses.composite import Composite
from oprd_tune.losses.masking import StateSelector, response_tokens
from oprd_tune.modeling.heads import Heads, LMHead
from oprd_tune.modeling.sharding import Sharding, sync_gradients
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.ranks import Ranks
from oprd_tune.teacher import FrozenTeacher
from oprd_tune.training.gradients import backward
from oprd_tune.types import LayerPair
from tests.conftest import DEPTH, VOCAB, make_model
from tests.distributed.spawn import run_ranks
from tests.losses.test_composite import rollout

PAIRS = [LayerPair(1, 1), LayerPair(DEPTH, DEPTH)]
LOSSES = {
    "full": lambda: Composite({"opd": FullReverseKL(chunk_tokens=3)}),
    "top-k": lambda: Composite({"opd": TopKReverseKL(k=4)}),
    "divergences": lambda: Composite(
        {
            "forward": ForwardKL(entry_clip=0.1),
            "jsd": GeneralisedJSD(beta=0.3),
            "mixed": MixedKL(chunk_tokens=2),
            "tailed": TailedTopKKL(k=3),
            "top_k": TopKMixedKL(k=4, support="teacher"),
        }
    ),
    "composite": lambda: Composite({"opd": FullReverseKL(), "oprd": HiddenStateMSE()}),
}


def accumulate(model, loss, micro_batches, *, tied, ranks):
    """Backpropagate a rank's microbatches of a step in which every row comes twice."""
    teacher = make_model(tied=tied, seed=1)
    heads = Heads(LMHead(model), LMHead(teacher), VOCAB)
    frozen = FrozenTeacher(teacher, PAIRS, final=True)
    select = StateSelector()
    counts_P = 2 * torch.tensor(loss.counts(rollout(), select))
    for micro in micro_batches:
        tokens, selection = response_tokens(micro), select(micro)
        targets = frozen.targets(micro.tokens_BS, selection.index_T, tokens.index_T)
        stream = loss.stream(targets, tokens, selection, heads=heads, pairs=PAIRS)
        with layer_taps(model, stream.layers, stream):
            sums_P = model(micro.tokens_BS)
        sync_gradients(model, micro is micro_batches[-1])
        backward(sums_P, counts_P, world_size=ranks.world_size)


def compare(rank, name, tied):
    """On one of two ranks: the row of this rank, twice and then idle, against both rows in one process."""
    rows = [rollout().rows(torch.tensor([i])) for i in range(2)]
    whole, sharded = make_model(tied=tied), make_model(tied=tied)
    accumulate(whole, LOSSES[name](), rows + rows, tied=tied, ranks=Ranks())
    ranks = Ranks(rank, 2)
    sharding = Sharding(ranks)
    for layer in sharded.layers:
        sharding.block(layer)
    sharding.rest(sharded, gathered_head=True)
    accumulate(sharded, LOSSES[name](), [rows[rank], rows[rank], rows[rank].idle()], tied=tied, ranks=ranks)
    got = dict(sharded.named_parameters())
    for parameter_name, parameter in whole.named_parameters():
        torch.testing.assert_close(
            got[parameter_name].grad.full_tensor(), parameter.grad, rtol=1e-4, atol=1e-7, msg=parameter_name
        )
    assert whole.tok_embeddings.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "tied"),
    [("full", True), ("top-k", False), ("divergences", True), ("composite", True), ("composite", False)],
)
def test_gradients_are_those_of_one_process(name, tied, tmp_path):
    run_ranks(compare, 2, tmp_path, name, tied)
