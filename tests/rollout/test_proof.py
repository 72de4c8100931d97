"""A rollout passes with the weights that sampled it, and with no others."""

from dataclasses import replace

import pytest
import torch
from torchtune.models.qwen2 import qwen2

from oprd_tune.errors import RolloutError
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.vllm.proof import measure_gap, prove_on_policy
from tests.conftest import VOCAB, make_model
from tests.rollout.test_native import make_prompts, sampler
from tests.rollout.test_policy_weights import KINDS, make_student, policy_weights

GROUPS = (
    *("tok_embeddings", "q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"),
    *("output_proj", "sa_norm", "mlp_norm", "w1", "w2", "w3", "norm.scale", "output.weight"),
)
CHOSEN = (6, 7, 2, 3)  # two samples each of the shortest prompts of `make_prompts`
each_tying = pytest.mark.parametrize("tied", [True, False])


def moved(rollout, at_BS, change):
    """With other log-probabilities of the sampler at some places."""
    return replace(rollout, sampler_logprobs_BS=rollout.sampler_logprobs_BS + change * at_BS)


@each_tying
@pytest.mark.parametrize("kind", KINDS)
def test_the_students_own_rollout_passes(kind, tied, tmp_path):
    model = make_student(kind, tied).train()
    rollout = sampler(model, samples_per_prompt=2).sample(make_prompts())
    proven = prove_on_policy(rollout, policy_weights(model, tmp_path), None)
    gap = proven.logprob_gap
    assert 0 <= gap.mean <= gap.largest < 1e-5
    assert gap.tokens == sum(rollout.response_mask_BS[row].sum() for row in CHOSEN)
    assert all(getattr(proven, name) is getattr(rollout, name) for name in ("tokens_BS", "sampler_logprobs_BS"))
    assert model.training
    assert model(rollout.tokens_BS).shape == (*rollout.tokens_BS.shape, VOCAB)


@pytest.mark.parametrize("group", GROUPS)
def test_every_changed_weight_fails(group, tmp_path):
    model = make_model(tied=False)
    rollout = sampler(model, samples_per_prompt=2).sample(make_prompts())
    weights = policy_weights(model, tmp_path)
    changed = [p for name, p in model.named_parameters() if group in name]
    assert changed
    with torch.no_grad():
        for parameter in changed:
            parameter.mul_(1.5)
    with pytest.raises(
        RolloutError, match="policy version 0 is not the student's.*rollout.logprob_gap_limit allows 0.001"
    ):
        prove_on_policy(rollout, weights, None)


@pytest.fixture(scope="module")
def long_rollout():
    """Ten rows of 70 to 80 response tokens, and their student."""
    model = make_model(build=lambda **shape: qwen2(**{**shape, "max_seq_len": 128}))
    return model, sampler(model, samples_per_prompt=2, stop_tokens=[999], max_new_tokens=80).sample(make_prompts())


def judged(rollout):
    """The first 32 tokens of the four rows with the shortest prompts."""
    at_BS = rollout.response_mask_BS.clone()
    for row in range(len(rollout)):
        first = int(at_BS[row].nonzero()[0])
        at_BS[row, first + 32 :] = False
        at_BS[row] &= row in CHOSEN
    return at_BS


def test_only_the_first_tokens_of_a_few_rows_are_looked_at(long_rollout):
    model, rollout = long_rollout
    widths = []
    handle = model.layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[:2]))
    gap = measure_gap(moved(rollout, ~judged(rollout), 5.0), model, Ranks())
    handle.remove()
    assert gap.largest < 1e-5
    assert gap.tokens == 4 * 32
    assert widths == [(4, max(int(rollout.lengths_B[row]) - 80 for row in CHOSEN) + 32)]


@pytest.mark.parametrize("row", CHOSEN)
@pytest.mark.parametrize("place", [0, 31])
def test_the_gap_is_that_of_the_formula(row, place, long_rollout):
    """Of either sign: |Δ| is what counts."""
    model, rollout = long_rollout
    column = int(rollout.response_mask_BS[row].nonzero()[0]) + place
    at_BS = torch.zeros_like(rollout.response_mask_BS)
    at_BS[row, column] = True
    other_BS = judged(rollout) & ~at_BS
    gap = measure_gap(moved(moved(rollout, at_BS, -2.0), other_BS, 0.5), model, Ranks())
    assert gap.mean == pytest.approx((2.0 + 127 * 0.5) / 128, abs=1e-5)
    assert gap.largest == pytest.approx(2.0, abs=1e-5)


def test_the_mean_decides_not_the_worst_token(long_rollout, tmp_path):
    model, rollout = long_rollout
    at_BS = judged(rollout)
    at_BS[:6] = at_BS[7:] = False
    at_BS[6, : int(at_BS[6].nonzero()[1])] = False
    weights = policy_weights(model, tmp_path)
    share = at_BS.sum().item() / 128
    gap = prove_on_policy(moved(rollout, at_BS, 0.9e-3 / share), weights, None).logprob_gap
    assert gap.mean < 1e-3 < gap.largest
    with pytest.raises(RolloutError, match="is not the student's"):
        prove_on_policy(moved(rollout, at_BS, 1.1e-3 / share), weights, None)


def test_long_prompts_leave_room_for_fewer_rows():
    """192 columns in all, but always one row."""
    model = make_model(build=lambda **shape: qwen2(**{**shape, "max_seq_len": 512}))
    for lengths, rows in (((100, 90, 80), 1), ((300,), 1), ((60, 62, 64), 2), ((10, 11, 80, 90), 2)):
        rollout = sampler(model, stop_tokens=[999], max_new_tokens=40).sample(make_prompts(lengths))
        assert measure_gap(rollout, model, Ranks()).tokens == rows * 32


@pytest.mark.parametrize("samples", [1, 3])
def test_few_rows_are_all_looked_at(samples):
    model = make_model()
    rollout = sampler(model, samples_per_prompt=samples).sample(make_prompts((3,)))
    gap = measure_gap(moved(rollout, rollout.response_mask_BS, 0.25), model, Ranks())
    assert gap.tokens == rollout.response_tokens
    assert gap.mean == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize(
    ("dtype", "limit", "change", "passes"),
    [
        (torch.float32, None, 0.9e-3, True),
        (torch.float32, None, 1.1e-3, False),
        (torch.bfloat16, None, 0.09, True),
        (torch.bfloat16, None, 0.11, False),
        (torch.bfloat16, 0.05, 0.06, False),
        (torch.float32, 0.5, 0.4, True),
    ],
)
def test_the_limit_is_the_precisions_unless_given(dtype, limit, change, passes, tmp_path):
    model = make_model()
    rollout = sampler(model).sample(make_prompts())
    shifted = moved(rollout, rollout.response_mask_BS, change)
    weights = policy_weights(model, tmp_path, dtype=dtype)
    if passes:
        assert prove_on_policy(shifted, weights, limit).logprob_gap.mean == pytest.approx(change, abs=1e-5)
    else:
        with pytest.raises(RolloutError, match=f"allows {limit or {2: 0.1, 4: 0.001}[dtype.itemsize]:.3g}$"):
            prove_on_policy(shifted, weights, limit)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("limit", [None, 1e9])
def test_what_is_no_number_fails(value, limit, tmp_path):
    model = make_model()
    rollout = sampler(model).sample(make_prompts())
    weights = policy_weights(model, tmp_path)
    broken = rollout.sampler_logprobs_BS.clone()
    broken[0, int(rollout.response_mask_BS[0].nonzero()[0])] = value
    with pytest.raises(RolloutError, match="is not the student's"):
        prove_on_policy(replace(rollout, sampler_logprobs_BS=broken), weights, limit)
    with torch.no_grad():
        model.norm.scale.fill_(value)
    with pytest.raises(RolloutError, match="by nan nats"):
        prove_on_policy(rollout, weights, limit)


def test_both_sides_leave_the_same_tokens_out(tmp_path):
    model = make_model()
    rollout = sampler(model, vocabulary=7, samples_per_prompt=2).sample(make_prompts())
    assert prove_on_policy(rollout, policy_weights(model, tmp_path / "7", vocabulary=7), None).logprob_gap.mean < 1e-5
    with pytest.raises(RolloutError, match="is not the student's"):
        prove_on_policy(rollout, policy_weights(model, tmp_path / "all"), None)
