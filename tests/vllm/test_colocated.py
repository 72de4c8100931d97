"""vLLM in the trainer's own processes, one and two of them, held against the native engine."""

import json
import os

import pytest
import torch

from oprd_tune.errors import RolloutError
from oprd_tune.ranks import Ranks
from oprd_tune.rollout import VLLMColocated
from oprd_tune.rollout.native.sampler import Sampler
from oprd_tune.types import Prompts
from tests.distributed.spawn import run_ranks
from tests.vllm.students import GROUPS, PROMPTS, make_student, move, native, request, started

pytest.importorskip("vllm")
CACHE = {"kv_cache_gib": 0.125}
KINDS = ("tied", "untied", "lora", "dora", "qwen3", "llama", "mistral")
SINGLE = [(kind, group) for kind in KINDS[:2] for group in (*GROUPS, *(["output.weight"] if kind == "untied" else []))]
SINGLE += [("qwen3", group) for group in ("q_proj.linear", "q_proj.norm", "k_proj.norm")]
SINGLE += [("llama", group) for group in ("q_proj", "k_proj")]  # whose rows are stored in another order


def compare(engine, model, prompts, version):
    """Greedy tokens and log-probabilities of a synced engine against the native one's."""
    engine.sync_weights(version)
    found = engine.generate(prompts, stream=version)
    wanted = native(model, temperature=0).sample(prompts, stream=version)
    same = torch.equal(found.tokens_BS, wanted.tokens_BS)
    gap = (found.sampler_logprobs_BS - wanted.sampler_logprobs_BS).abs().max().item() if same else None
    return {"same": same, "gap": gap, "proof": found.logprob_gap.largest, "version": found.policy_version}


def forget(engine, group):
    """Lose what is sent of some parameters on its way into vLLM; returns how to undo that."""
    rpc = engine._llm.collective_rpc

    def lossy(method, **kwargs):
        if method == "reload_weights":
            stream = kwargs["kwargs"]["weights_iterator"]
            kwargs["kwargs"]["weights_iterator"] = (item for item in stream if group not in item[0])
        return rpc(method, **kwargs)

    engine._llm.collective_rpc = lossy
    return lambda: setattr(engine._llm, "collective_rpc", rpc)


def message(action):
    try:
        action()
    except RolloutError as error:
        return str(error)
    return ""


def stale(engine, model, vllm_name, group):
    """What is said when vLLM keeps old values of parameters that have moved since."""
    undo = forget(engine, vllm_name)
    move(model, group)

    def rollout():
        engine.sync_weights(99)
        engine.generate(PROMPTS)

    said = message(rollout)
    undo()
    return said


def on_one_rank(rank, folder):
    results = {}
    threads, noise = torch.set_num_threads, torch.get_rng_state()
    for kind in KINDS:
        policy = make_student(kind, folder / kind)
        model = policy.model
        torch.set_rng_state(noise)
        engine = started(VLLMColocated(temperature=0.0, **CACHE), policy)
        results[kind] = [compare(engine, model, PROMPTS, 0)]
        for version, group in enumerate(("", *[group for k, group in SINGLE if k == kind]), start=1):
            assert move(model, group, by=0.02 if not group else 0.1), group
            results[f"{kind} unsynced {group}"] = message(lambda: engine.generate(PROMPTS))  # noqa: B023
            results[kind].append(compare(engine, model, PROMPTS, version))
        if kind == "tied":
            names = {"embed_tokens": "tok_embeddings", "lm_head": "tok_embeddings", "q_proj.bias": "q_proj.bias"}
            names |= {"input_layernorm": "sa_norm", "down_proj": "mlp.w2", "o_proj": "output_proj"}
            results["stale"] = {name: stale(engine, model, name, group) for name, group in names.items()}
            engine.sync_weights(100)
            engine._llm.update_weight_version("another")
            results["foreign"] = message(lambda: engine.generate(PROMPTS))  # noqa: B023
        engine.close()
    policy = make_student("tied", folder / "sampled")
    engine = started(VLLMColocated(**CACHE), policy, samples_per_prompt=3, seed=7, top_k_ids=3)
    engine.sync_weights(4)
    torch.save([engine.generate(PROMPTS, stream=s) for s in (1, 1, 2)], folder / "sampled.pt")
    torch.save(native(policy.model, samples_per_prompt=500, max_new_tokens=1).sample(PROMPTS), folder / "native.pt")
    engine.close()
    mine = request(vocabulary=16, samples_per_prompt=3, seed=7, top_k_ids=3)
    longer = request(vocabulary=16, max_new_tokens=40, samples_per_prompt=2, temperature=0.0, stop_tokens=[])
    engine = VLLMColocated(**CACHE)
    engine.start(policy, mine, longer)
    engine.sync_weights(4)
    rollouts = [engine.generate(PROMPTS, request=longer), engine.generate(PROMPTS, stream=1)]
    rollouts += [engine.generate(PROMPTS, request=longer), Sampler(policy.model, longer).sample(PROMPTS)]
    torch.save(rollouts, folder / "asked.pt")
    engine._has_forgotten = move(policy.model, "q_proj.bias") > 0  # as on a GPU, where the engine slept in between
    results["forgotten"] = message(lambda: engine.generate(PROMPTS, request=longer))
    engine.close()
    results["process"] = [torch.set_num_threads is threads, torch.equal(noise, torch.get_rng_state())]
    # The run's own group, for CPUs too, was there before vLLM could make one, and outlives it.
    results["process"].append(torch.device("cpu") in torch.distributed.group.WORLD._device_types)
    (folder / "results.json").write_text(json.dumps(results))


def on_two_ranks(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    ranks = Ranks(rank, 2)
    mine = Prompts(PROMPTS.tokens[rank::2], PROMPTS.positions[rank::2], (None, None))
    results = {}
    for kind, together in (("tied", 1), ("lora", 1), ("tied", 2)):
        policy = make_student(kind, folder / f"{kind}{rank}", ranks)
        model = policy.model
        engine = VLLMColocated(temperature=0.0, tensor_parallel_size=together, **CACHE)
        engine.check(ranks.device, ranks)
        started(engine, policy)
        name = f"{kind} {together}"
        results[name] = [compare(engine, model, mine, 0)]
        move(model, "", by=0.02)
        results[f"{name} unsynced"] = message(lambda: engine.generate(mine))  # noqa: B023
        results[name].append(compare(engine, model, mine, 1))
        if rank == 1:
            engine._llm.update_weight_version("another")
        results[f"{name} one rank foreign"] = message(lambda: engine.generate(mine))  # noqa: B023
        engine.close()
    assert torch.distributed.is_initialized()
    (folder / f"results{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colocated")
    run_ranks(on_one_rank, 1, folder, folder)
    return folder


def test_a_call_may_bring_a_longer_request_of_its_own(folder):
    asked, training, again, wanted = torch.load(folder / "asked.pt", weights_only=False)
    assert torch.equal(asked.tokens_BS, wanted.tokens_BS)
    assert torch.equal(asked.tokens_BS, again.tokens_BS)
    assert asked.response_mask_BS.sum(1).tolist() == [40] * 8
    assert asked.sampler_top_ids_BSK is None
    before = torch.load(folder / "sampled.pt", weights_only=False)[0]
    assert torch.equal(training.tokens_BS, before.tokens_BS)
    assert torch.equal(training.sampler_logprobs_BS, before.sampler_logprobs_BS)


def test_weights_that_an_engine_lost_in_its_sleep_are_sent_again(single):
    assert single["forgotten"] == ""


@pytest.fixture(scope="module")
def single(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_ranks(on_two_ranks, 2, folder, folder)
    return [json.loads((folder / f"results{rank}.json").read_text()) for rank in (0, 1)]


def assert_equal_to_native(comparisons):
    for version, found in enumerate(comparisons):
        assert found["same"], found
        assert found["gap"] < 1e-4
        assert found["proof"] < 1e-4
        assert found["version"] == version


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_and_log_probabilities_are_the_native_engines_after_every_sync(single, kind):
    assert_equal_to_native(single[kind])


@pytest.mark.parametrize(("kind", "group"), SINGLE)
def test_a_changed_group_of_parameters_shows_until_it_is_synced(single, kind, group):
    assert "is not the student's: log-probabilities of" in single[f"{kind} unsynced {group}"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("embed_tokens", "model.embed_tokens.weight is stale"),
        ("lm_head", "lm_head.weight is stale"),
        ("q_proj.bias", "model.layers.0.self_attn.qkv_proj.bias, model.layers.1"),
        ("input_layernorm", "model.layers.0.input_layernorm.weight, model.layers.1"),
        ("down_proj", "log-probabilities"),  # packed on a CPU, where nobody can look into it
        ("o_proj", "log-probabilities"),
    ],
)
def test_what_did_not_arrive_is_named(single, name, said):
    assert said in single["stale"][name]


def test_tokens_of_other_weights_are_refused(single):
    assert "vLLM sampled with weights another instead of 100" in single["foreign"]


def test_samples_follow_seed_and_stream_and_carry_what_was_asked_for(folder):
    first, again, other = torch.load(folder / "sampled.pt", weights_only=False)
    assert torch.equal(first.tokens_BS, again.tokens_BS)
    assert not torch.equal(first.tokens_BS, other.tokens_BS)
    assert first.prompt_positions_B.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert first.policy_version == 4
    at = first.response_mask_BS
    assert first.sampler_top_ids_BSK.shape[-1] == 3
    assert (first.sampler_top_mass_BS[at] <= 1 + 1e-6).all()
    in_top = (first.sampler_top_ids_BSK == first.tokens_BS[..., None]).any(-1)
    assert (first.sampler_logprobs_BS.exp() <= first.sampler_top_mass_BS + 1e-5)[at & in_top].all()
    for row in range(len(first)):
        last = first.tokens_BS[row, int(first.lengths_B[row]) - 1]
        assert bool(first.truncated_B[row]) == (last != 1)


def test_the_process_is_left_as_it_was(single):
    assert single["process"] == [True, True, True]


@pytest.mark.parametrize("name", ["tied 1", "lora 1", "tied 2"])
def test_two_sharded_ranks_sample_as_the_native_engine(double, name):
    for results in double:
        assert_equal_to_native(results[name])
        assert "is not the student's" in results[f"{name} unsynced"]
        assert "sampled with weights another" in results[f"{name} one rank foreign"]
