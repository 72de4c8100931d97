import math
from dataclasses import fields

import pytest
import torch

from oprd_tune.errors import ConfigError, RolloutError
from oprd_tune.rollout import VLLMColocated, VLLMServer
from oprd_tune.rollout.vllm.requests import Sampling, check_versions
from oprd_tune.types import Prompts
from tests.conftest import VOCAB, make_model
from tests.rollout.test_native import make_prompts, request, sampler

CPU = torch.device("cpu")


def sampling(*, temperature=1.0, **kwargs):
    return Sampling(request(**kwargs), VOCAB, temperature)


def seeds(prompts, stream=0, **kwargs):
    return [parameters["seed"] for _, parameters in sampling(**kwargs).requests(prompts, stream)]


def part(prompts, places):
    return Prompts(
        tuple(prompts.tokens[i] for i in places),
        tuple(prompts.positions[i] for i in places),
        tuple(prompts.answers[i] for i in places),
    )


def test_runs_streams_and_samples_each_have_seeds_of_their_own():
    found = [
        seed
        for run in (0, 1, 2, 2**32 - 1)
        for stream in (0, 1, 2, 100_000)
        for first in (0, 5, 10**9)
        for seed in seeds(make_prompts(first_position=first), stream, seed=run, samples_per_prompt=3)
    ]
    assert len(set(found)) == len(found) == 4 * 4 * 3 * 15
    assert 0 <= min(found) < 2**60 < 2**62 < max(found) < 2**63


def test_a_request_may_have_a_temperature_and_other_lengths():
    own = sampling(temperature=1.0)
    assert own.of(None) is own
    for temperature, expected in ((0.25, 0.25), (0.0, 0.0), (None, 1.0)):
        other = own.of(request(max_new_tokens=77, samples_per_prompt=2, temperature=temperature))
        asked = other.requests(make_prompts(), 0)
        assert {parameters["temperature"] for _, parameters in asked} == {expected}
        assert {parameters["max_tokens"] for _, parameters in asked} == {77}
        assert len(asked) == 2 * len(make_prompts())


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_ask_for_what_one_process_would(world_size):
    whole, own = make_prompts(first_position=40), sampling(samples_per_prompt=2, seed=3)
    wanted = own.requests(whole, 7)
    shares = [part(whole, range(rank, len(whole), world_size)) for rank in range(world_size)]
    asked = [request for share in shares for request in own.requests(share, 7)]
    assert sorted(map(str, asked)) == sorted(map(str, wanted))
    assert [tokens for tokens, _ in wanted] == [list(tokens) for tokens in whole.tokens for _ in range(2)]


@pytest.mark.parametrize(("top_k_ids", "logprobs"), [(0, 0), (1, 2), (4, 5)])
def test_requests_say_what_to_sample(top_k_ids, logprobs):
    ((tokens, parameters),) = sampling(stop_tokens={9, 1, 5}, temperature=0.5, top_k_ids=top_k_ids).requests(
        Prompts(((4, 2),), (0,), (None,)), stream=0
    )
    assert tokens == [4, 2]
    del parameters["seed"]
    assert parameters == {
        "temperature": 0.5,
        "max_tokens": 12,
        "stop_token_ids": [1, 5, 9],
        "ignore_eos": True,
        "logprobs": logprobs,
        "detokenize": False,
    }


def logs(**probabilities):
    return {int(name[1:]): math.log(p) for name, p in probabilities.items()}


def test_the_most_probable_tokens_are_told_apart_from_the_sampled_one():
    """At the first place the sampled token is not among the top two, at the second it is."""
    by_id = [logs(t9=0.01, t3=0.5, t4=0.125, t5=0.25), logs(t4=0.25, t7=0.5, t8=0.125)]
    response = sampling(top_k_ids=2).response([9, 4], by_id)
    assert response.tokens_T.tolist() == [9, 4]
    assert response.top_ids_TK.tolist() == [[3, 5], [7, 4]]
    torch.testing.assert_close(response.logprobs_T.exp(), torch.tensor([0.01, 0.25]))
    torch.testing.assert_close(response.top_mass_T, torch.tensor([0.75, 0.75]))


def test_without_top_tokens_there_are_none():
    own = sampling()
    response = own.response([9, 1], [logs(t9=0.5, t3=0.25), logs(t1=0.125)])
    assert response.top_ids_TK.shape == (2, 0)
    assert response.top_mass_T.tolist() == [0, 0]
    rollout = own.pack(Prompts(((4,),), (0,), (None,)), [response], 3, CPU)
    assert rollout.sampler_top_ids_BSK is rollout.sampler_top_mass_BS is rollout.logprob_gap is None
    assert rollout.policy_version == 3


def test_a_response_and_its_log_probabilities_are_equally_long():
    with pytest.raises(RolloutError, match="lacks log-probabilities: .* shorter"):
        sampling().response([9, 1], [logs(t9=0.5)])


@pytest.mark.parametrize("k", [0, 1, 3])
def test_the_native_engines_responses_make_its_rollout(k):
    """What vLLM would tell of them, without an order, and with one token more than asked for."""
    model, prompts = make_model(), make_prompts()
    want = sampler(model, samples_per_prompt=2, top_k_ids=k).sample(prompts)
    with torch.no_grad():
        logprobs_BSV = model(want.tokens_BS).log_softmax(-1)
    own, responses = sampling(samples_per_prompt=2, top_k_ids=k), []
    for row, mask in enumerate(want.response_mask_BS):
        places = mask.nonzero(as_tuple=True)[0].tolist()
        tokens = want.tokens_BS[row][mask].tolist()
        by_id = []
        for place, token in zip(places, tokens, strict=True):
            told = logprobs_BSV[row, place - 1]
            ids = {token, *told.topk(own.logprobs).indices.tolist()}
            by_id.append({i: told[i].item() for i in sorted(ids)})
        responses.append(own.response(tokens, by_id))
    got = own.pack(prompts, responses, want.policy_version, CPU)
    for field in fields(want):
        one, other = getattr(got, field.name), getattr(want, field.name)
        if isinstance(other, torch.Tensor) and other.is_floating_point():
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        elif isinstance(other, torch.Tensor):
            assert torch.equal(one, other), field.name
        else:
            assert one == other
    assert 0 < want.truncated_B.sum() < len(want)


def test_tokens_of_other_weights_are_refused():
    check_versions(["run/3"], "run/3", "http://a")
    check_versions(["run/3", "run/3"], "run/3", "http://a")
    with pytest.raises(
        RolloutError, match="^http://a sampled with weights other/9, run/2 instead of run/3; does another"
    ):
        check_versions(["run/3", "run/2", "other/9", "run/2"], "run/3", "http://a")
    with pytest.raises(RolloutError, match="sampled with weights that it does not name instead of run/3"):
        check_versions([], "run/3", "http://a")


@pytest.mark.parametrize("engine", [VLLMColocated, VLLMServer])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.5}, "rollout.temperature is -0.5; it must be a finite number, 0 or above"),
        ({"gpu_memory_utilization": 1.5}, "it must be at most 1"),
        ({"temperature": float("inf")}, "rollout.temperature is inf; it must be a finite number, 0 or above"),
        ({"kv_cache_gib": 0}, "rollout.kv_cache_gib is 0; it must be a finite number above 0"),
        ({"logprob_gap_limit": -1.0}, "rollout.logprob_gap_limit is -1.0; it must be a finite number above 0"),
    ],
)
def test_wrong_arguments_are_explained(engine, arguments, message):
    with pytest.raises(ConfigError, match=message):
        engine(**arguments)
