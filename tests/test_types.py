"""Responses that hit the limit: kept, masked or dropped; and rows cut into microbatches."""

from dataclasses import fields, replace

import pytest
import torch

from oprd_tune.losses import HiddenStateMSE
from oprd_tune.losses.masking import StateSelector
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.packing import STARTING
from oprd_tune.rollout.native.sampler import Sampler
from oprd_tune.teacher import FrozenTeacher
from oprd_tune.training.gradients import backward
from oprd_tune.types import LayerPair, LogprobGap, Reading, Rollout, SamplingRequest
from tests.conftest import DEPTH, make_model
from tests.rollout.test_native import PAD, STOP, make_prompts

PAIRS = [LayerPair(1, 1), LayerPair(DEPTH, DEPTH)]
SELECTIONS = [("all", 1), ("last", 1), ("first_k", 3), ("last_k", 3)]


def make_rollout(stop_tokens=(STOP, 5, 6)):
    request = SamplingRequest(
        stop_tokens=stop_tokens,
        pad_id=PAD,
        max_prompt_tokens=7,
        max_new_tokens=12,
        samples_per_prompt=2,
        top_k_ids=2,
    )
    return Sampler(make_model(), request).sample(make_prompts())


def learn(rollout, select, tokens_per_micro_batch=60):
    """A step's loss and gradients."""
    student, teacher, loss = make_model(), make_model(seed=1), HiddenStateMSE()
    frozen = FrozenTeacher(teacher, PAIRS)
    count = len(select(rollout))
    total = torch.zeros(())
    for micro in rollout.split(tokens_per_micro_batch):
        selection = select(micro)
        stream = loss.stream(PAIRS, frozen.targets(micro.tokens_BS, selection.index_T).states, selection)
        with layer_taps(student, [pair.student for pair in PAIRS], stream):
            summed = student(micro.tokens_BS)
        backward(summed, max(count, 1))
        total += summed.detach()
    return total / max(count, 1), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", ["keep", "mask", "drop"])
def test_a_rollout_without_truncated_responses_is_itself(policy):
    rollout = make_rollout()
    whole = rollout.rows((~rollout.truncated_B).nonzero(as_tuple=True)[0])
    assert whole.without_truncated(policy) is whole
    assert rollout.without_truncated("keep") is rollout


def test_masking_leaves_rows_and_dropping_leaves_whole_ones():
    rollout = replace(make_rollout(), logprob_gap=LogprobGap(*(0.1,) * len(fields(LogprobGap))))
    before = rollout.response_mask_BS.clone()
    masked, dropped = (rollout.without_truncated(policy) for policy in ("mask", "drop"))
    whole_B = ~rollout.truncated_B
    assert 0 < whole_B.sum() < len(rollout)
    assert torch.equal(masked.response_mask_BS, before & whole_B[:, None])
    assert masked.tokens_BS is rollout.tokens_BS
    width = int(rollout.lengths_B[whole_B].max())
    for field in fields(rollout):
        kept, all_rows = getattr(dropped, field.name), getattr(rollout, field.name)
        if not isinstance(all_rows, torch.Tensor):
            assert kept == all_rows
        else:
            assert torch.equal(kept, all_rows[whole_B][:, :width] if "_BS" in field.name else all_rows[whole_B])
    assert torch.equal(rollout.response_mask_BS, before)


@pytest.mark.parametrize(("positions", "k"), SELECTIONS)
def test_losses_do_not_tell_masked_responses_from_dropped_ones(positions, k):
    rollout, select = make_rollout(), StateSelector(positions, k)
    masked, dropped = (rollout.without_truncated(policy) for policy in ("mask", "drop"))
    counts = [len(select(r)) for r in (rollout, masked, dropped)]
    assert 0 < counts[1] == counts[2] < counts[0]
    (one, gradients), (other, others), (kept, _) = (learn(r, select) for r in (masked, dropped, rollout))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert (one - kept).abs() > 1e-4 * one
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-7)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3


@pytest.mark.parametrize("policy", ["mask", "drop"])
def test_where_every_response_was_cut_nothing_is_learned(policy):
    rollout = make_rollout(stop_tokens=[999])
    assert rollout.truncated_B.all()
    left = rollout.without_truncated(policy)
    assert len(left) == (1 if policy == "drop" else len(rollout))
    assert left.response_tokens == len(StateSelector()(left)) == 0
    assert torch.equal(left.tokens_BS[0], rollout.tokens_BS[0, : left.tokens_BS.shape[1]])
    loss, gradients = learn(left, StateSelector())
    assert loss == 0
    assert gradients
    assert all(gradient.count_nonzero() == 0 for gradient in gradients.values())


def of_lengths(lengths):
    column = torch.arange(len(lengths))[:, None].expand(-1, max(lengths))
    no_BS = torch.zeros(column.shape, dtype=torch.bool)
    rows = torch.arange(len(lengths))
    return Rollout(column, no_BS, no_BS.float(), torch.tensor(lengths), rows < 0, rows, 0)


def cost(parts):
    return sum(max(part) * len(part) + STARTING for part in parts)


def every_cut(lengths):
    """All ways to cut a list into parts of neighbours."""
    yield [lengths]
    for i in range(1, len(lengths)):
        yield from ([lengths[:i], *rest] for rest in every_cut(lengths[i:]))


@pytest.mark.parametrize("budget", [900, 4000, 9000, 10**6])
def test_the_cut_into_microbatches_is_the_cheapest_of_all(budget):
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        lengths = (torch.rand(9, generator=generator).pow(2) * 3000 + 5).long().tolist()
        found = [micro.lengths_B.tolist() for micro in of_lengths(lengths).split(budget)]
        descending = sorted(lengths, reverse=True)
        assert [length for part in found for length in part] == descending
        fitting = (
            cut
            for cut in every_cut(descending)
            if all(len(part) == 1 or max(part) * len(part) <= budget for part in cut)
        )
        assert cost(found) == min(map(cost, fitting))


@pytest.mark.parametrize("packed", [False, True])
def test_a_microbatch_holds_what_either_model_reads(packed):
    """A teacher whose prompts are longer reads no more tokens at once than the student may."""
    rollout = of_lengths([300, 250, 200, 100, 100, 100])
    theirs_B = torch.tensor([300, 250, 200, 500, 600, 100])
    width = int(rollout.lengths_B.max())
    reading = Reading(torch.zeros(6, 600, dtype=torch.long), theirs_B, torch.full((6, width), -1))
    parts = replace(rollout, reading=reading).split(600, packed=packed)
    assert all(int(part.lengths_B.sum()) <= 600 and int(part.reading.lengths_B.sum()) <= 600 for part in parts)
    assert sorted(n for part in parts for n in part.reading.lengths_B.tolist()) == sorted(theirs_B.tolist())
    assert len(parts) < 6


def test_what_fits_into_one_microbatch_stays_one_where_more_cost_memory():
    rollout = of_lengths([3000, 100, 100, 100])
    assert [len(micro) for micro in rollout.split(12_000)] == [1, 3]
    assert [len(micro) for micro in rollout.split(12_000, one_if_it_fits=True)] == [4]
    assert [len(micro) for micro in rollout.split(11_999, one_if_it_fits=True)] == [1, 3]
