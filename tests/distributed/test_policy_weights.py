"""A student spread over two gloo ranks: what engines are sent, and the proof of what they sample."""

from dataclasses import replace

import pytest
import torch
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer

from oprd_tune.errors import RolloutError
from oprd_tune.modeling.adapters import adapter_names
from oprd_tune.modeling.sharding import Sharding
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.vllm.fingerprints import Digests, Fingerprints
from oprd_tune.rollout.vllm.proof import prove_on_policy
from tests.conftest import VOCAB
from tests.distributed.spawn import run_ranks
from tests.rollout.test_native import make_prompts, sampler
from tests.rollout.test_policy_weights import KINDS, assert_equal, make_student, policy_weights, sent


def make_base(kind, tied, base):
    """A student whose base may be less precise than its adapters."""
    model = make_student(kind, tied)
    adapters = adapter_names(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in adapters:
                parameter.data = parameter.data.to(base)
    return model


def spread(model, ranks, *, compute_dtype, gathered_head=False):
    """As training has it: blocks recomputed and sharded, then the rest."""
    training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    sharding = Sharding(ranks, compute_dtype=compute_dtype)
    for layer in model.layers:
        sharding.block(layer)
    sharding.rest(model, gathered_head=gathered_head)
    return model


def check_weights(rank, folder):
    ranks = Ranks(rank, 2)
    precisions = [(torch.float32, None, torch.float32), (torch.float32, torch.bfloat16, torch.bfloat16)]
    precisions += [(torch.bfloat16, torch.bfloat16, torch.bfloat16)]
    for number, (base, compute_dtype, dtype) in enumerate(precisions):
        for kind in KINDS:
            for tied in (True, False):
                own = folder / f"{rank} {number} {kind} {tied}"
                arguments = {"dtype": dtype, "vocabulary": VOCAB - 4}
                whole = policy_weights(make_base(kind, tied, base), own / "whole", **arguments)
                model = spread(make_base(kind, tied, base), ranks, compute_dtype=compute_dtype)
                sharded = policy_weights(model, own / "sharded", ranks=ranks, **arguments)
                assert_equal(sent(sharded), sent(whole))
                assert sharded.shapes() == whole.shapes()
                for make in (Fingerprints, Digests):
                    one, other = make(), make()
                    for checksums, weights in ((one, whole), (other, sharded)):
                        for _ in checksums.passing(weights.parts()):
                            pass
                    assert one.by_name == other.by_name
                    assert one.by_name


def check_proof(rank, folder):
    """Each rank has a rollout of its own, of another length, and both tell the same."""
    ranks = Ranks(rank, 2)
    for kind in KINDS:
        for tied, gathered_head in ((True, False), (True, True), (False, False), (False, True)):
            whole = make_student(kind, tied)
            rollout = sampler(whole, samples_per_prompt=2 + rank).sample(make_prompts(first_position=5 * rank))
            model = spread(make_student(kind, tied), ranks, compute_dtype=None, gathered_head=gathered_head)
            weights = policy_weights(model, folder / f"{rank} {kind} {tied} {gathered_head}", ranks=ranks)
            gap = prove_on_policy(rollout, weights, None).logprob_gap
            assert gap.mean <= gap.largest < 1e-5
            own = sampler(model, samples_per_prompt=2 + rank).sample(make_prompts(first_position=5 * rank))
            torch.testing.assert_close(prove_on_policy(own, weights, None).sampler_logprobs_BS, own.sampler_logprobs_BS)
            counts = rollout.response_mask_BS.sum(1)
            chosen = (rollout.lengths_B - counts).sort(stable=True).indices[:4]  # the shortest prompts
            tokens = ranks.collect(int(counts[chosen].sum()))
            assert gap.tokens == sum(tokens)
            for guilty in range(2):
                for change in (4.0, torch.nan, torch.inf):
                    at = rollout.sampler_logprobs_BS.clone()
                    if rank == guilty:
                        row = int(chosen[0])
                        at[row, int(rollout.response_mask_BS[row].nonzero()[0])] += change
                    with pytest.raises(RolloutError, match=f"probabilities of {gap.tokens} sampled tokens") as error:
                        prove_on_policy(replace(rollout, sampler_logprobs_BS=at), weights, None)
                    assert len(set(ranks.collect(str(error.value)))) == 1
                    assert change != 4.0 or f"by {4 / sum(tokens):.3g} nats in the mean, at most 4;" in str(error.value)
            # A student that moves on leaves its rollout behind.
            model.reshard()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.to_local().mul_(1.1)
            with pytest.raises(RolloutError, match="is not the student's"):
                prove_on_policy(rollout, weights, None)


def check_everything(rank, folder):
    check_weights(rank, folder / "weights")
    check_proof(rank, folder / "proof")


def test_engines_get_the_weights_of_one_process_and_ranks_agree_on_the_proof(tmp_path):
    run_ranks(check_everything, 2, tmp_path / "ranks", tmp_path)
