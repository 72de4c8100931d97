"""A real `vllm serve`, held against the native engine, and what happens when it is not the one that it should be."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

from oprd_tune.errors import ConfigError, RolloutError
from oprd_tune.ranks import Ranks
from oprd_tune.rollout import VLLMServer
from oprd_tune.rollout.vllm.client import LostServerError
from oprd_tune.rollout.vllm.server_process import ServerProcess
from oprd_tune.rollout.vllm.weight_transfer import FolderTransfer
from oprd_tune.types import Prompts, SamplingRequest
from tests.distributed.spawn import run_ranks
from tests.vllm.students import GROUPS, PROMPTS, make_student, move, native, request, started

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
ENGINE = {"temperature": 0.0, "timeout": 60.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that starts from the tied student, for all tests of this file."""
    folder = tmp_path_factory.mktemp("server")
    engine = VLLMServer(kv_cache_gib=0.125, server_environment=ENVIRONMENT, **ENGINE)
    started(engine, make_student("tied", folder / "student"))
    yield engine._process
    engine.close()


@pytest.fixture
def make_engine(server, tmp_path):
    def make(kind="tied", **kwargs):
        policy = make_student(kind, tmp_path / kind)
        fields = {*SamplingRequest.__dataclass_fields__} - {"temperature"}  # which is the engine's here
        asked = {name: kwargs.pop(name) for name in set(kwargs) & fields}
        engine = VLLMServer(**{"addresses": [server.address], **ENGINE, **kwargs})
        return policy.model, started(engine, policy, **asked)

    return make


def assert_equal_to_native(engine, model, version, prompts=PROMPTS):
    engine.sync_weights(version)
    found = engine.generate(prompts, stream=version)
    wanted = native(model, temperature=0).sample(prompts, stream=version)
    assert torch.equal(found.tokens_BS, wanted.tokens_BS)
    torch.testing.assert_close(found.sampler_logprobs_BS, wanted.sampler_logprobs_BS, rtol=0, atol=1e-4)
    assert found.logprob_gap.largest < 1e-4
    assert found.policy_version == version


@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
def test_greedy_tokens_and_log_probabilities_are_the_native_engines_after_every_sync(make_engine, kind):
    model, engine = make_engine(kind)
    assert_equal_to_native(engine, model, 0)
    for version, group in enumerate(GROUPS, start=1):
        move(model, group)
        with pytest.raises(RolloutError, match="is not the student's: log-probabilities of"):
            engine.generate(PROMPTS)
        assert_equal_to_native(engine, model, version)


def on_two_ranks(rank, folder, address):
    ranks = Ranks(rank, 2)
    policy = make_student("lora", folder / str(rank), ranks)
    policy = replace(policy, folder=folder)  # both see one
    engine = started(VLLMServer(addresses=[address], **ENGINE), policy)
    mine = Prompts(PROMPTS.tokens[rank::2], PROMPTS.positions[rank::2], (None, None))
    for version in range(2):
        assert_equal_to_native(engine, policy.model, version, mine)
        move(policy.model, "", by=0.02)
    ranks.wait()
    if rank == 0:
        engine._servers[0].commit_weights("another")
    ranks.wait()
    with pytest.raises(RolloutError, match="sampled with weights another instead of"):
        engine.generate(mine)


def test_two_sharded_ranks_share_a_server(server, tmp_path):
    run_ranks(on_two_ranks, 2, tmp_path, tmp_path, server.address)


def test_samples_do_not_depend_on_how_requests_are_spread(make_engine, server):
    twice = [server.address, server.address.replace("127.0.0.1", "localhost")]
    rollouts = []
    for addresses, in_flight in (([server.address], 1), (twice, 8)):
        _, engine = make_engine(
            addresses=addresses, requests_in_flight=in_flight, samples_per_prompt=3, temperature=1.0, top_k_ids=3
        )
        engine.sync_weights(0)
        rollouts.append(engine.generate(PROMPTS, stream=5))
    one, other = rollouts
    assert torch.equal(one.tokens_BS, other.tokens_BS)
    torch.testing.assert_close(one.sampler_top_mass_BS, other.sampler_top_mass_BS)
    at = one.response_mask_BS
    assert (one.sampler_logprobs_BS.exp()[at] <= 1).all()
    assert one.sampler_top_ids_BSK.shape[-1] == 3
    assert not torch.equal(one.tokens_BS, engine.generate(PROMPTS, stream=6).tokens_BS)


def test_a_call_may_bring_a_request_of_its_own(make_engine):
    model, engine = make_engine(temperature=1.0)
    engine.sync_weights(0)
    before = engine.generate(PROMPTS, stream=5)
    own = {"max_new_tokens": 4, "samples_per_prompt": 2, "vocabulary": 16, "temperature": 0.0}
    found, wanted = engine.generate(PROMPTS, request=request(**own)), native(model, **own).sample(PROMPTS)
    assert torch.equal(found.tokens_BS, wanted.tokens_BS)
    assert torch.equal(engine.generate(PROMPTS, stream=5).tokens_BS, before.tokens_BS)


def test_a_server_has_to_hold_the_longest_row_of_all_requests(server, tmp_path):
    engine = VLLMServer(addresses=[server.address], **ENGINE)
    policy = make_student("tied", tmp_path / "student")
    with pytest.raises(ConfigError, match="max_model_len is 24, below 56"):
        engine.start(policy, request(vocabulary=16), request(vocabulary=16, max_new_tokens=40))


@pytest.mark.parametrize(
    ("name", "group", "said"),
    [
        ("embed_tokens", "tok_embeddings", "model.embed_tokens.weight is stale"),
        ("lm_head", "tok_embeddings", "lm_head.weight is stale"),
        ("k_proj.bias", "k_proj.bias", "model.layers.0.self_attn.qkv_proj.bias, model.layers.1"),
        ("model.norm", "norm.scale", "model.norm.weight is stale"),
        ("up_proj", "mlp.w3", "log-probabilities"),  # packed on a CPU, where nobody can look into it
    ],
)
def test_what_did_not_arrive_is_named(make_engine, monkeypatch, name, group, said):
    model, engine = make_engine()
    engine.sync_weights(0)
    old = {key: w.clone() for part in engine._weights.parts() for key, w in part.items() if name in key}
    write = FolderTransfer._write

    def stale(self, parts, target):
        write(self, ({key: old.get(key, w) for key, w in part.items()} for part in parts), target)

    monkeypatch.setattr(FolderTransfer, "_write", stale)
    move(model, group)
    with pytest.raises(RolloutError, match=said):  # noqa: PT012 - either may find it
        engine.sync_weights(1)
        engine.generate(PROMPTS)


def test_weights_of_another_run_are_refused(make_engine):
    _, mine = make_engine()
    _, other = make_engine()
    mine.sync_weights(3)
    other.sync_weights(3)
    with pytest.raises(RolloutError, match=f"sampled with weights {other._run}/3 instead of {mine._run}/3"):
        mine.generate(PROMPTS)


def test_weights_that_another_run_began_to_send_are_refused(make_engine, monkeypatch):
    """Whoever fails in the middle has said before that the weights are no longer the others'."""
    _, mine = make_engine()
    _, other = make_engine()
    mine.sync_weights(0)

    def fail(server, folder):
        raise LostServerError("gone")

    with monkeypatch.context() as patch:
        patch.setattr("oprd_tune.rollout.vllm.client.VLLMClient.load_weights", fail)
        with pytest.raises(RolloutError, match="no vLLM server is left; .* was lost: gone"):
            other.sync_weights(7)
    with pytest.raises(
        RolloutError, match=f"sampled with weights {other._run}/7, on their way instead of {mine._run}/0"
    ):
        mine.generate(PROMPTS)


def test_a_full_disk_ends_a_sync_and_leaves_room(make_engine, monkeypatch, tmp_path):
    _, engine = make_engine(shared_folder=str(tmp_path / "shared"))
    files = iter(range(3))

    def save(tensors, path, metadata):
        if next(files, None) is None:
            raise SafetensorError("No space left on device")
        path.touch()

    monkeypatch.setattr("oprd_tune.rollout.vllm.weight_transfer.save_file", save)
    with pytest.raises(RolloutError, match="cannot be written to .*shared.*: No space left on device"):
        engine.sync_weights(0)
    assert not list((tmp_path / "shared").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 100}, "max_model_len is 24, below 116"),
        ({"addresses": ["http://127.0.0.1:9"], "startup_timeout": 0.5}, "nothing answers at http://127.0.0.1:9"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(make_engine, change, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(**change)


def test_another_version_and_another_model_are_refused_by_name(make_engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("oprd_tune.rollout.vllm.server_fit.VLLM_VERSION", "0.31.0")
        with pytest.raises(ConfigError, match="http://127.0.0.1:.* runs vLLM 0.32.0; this needs 0.31.0"):
            make_engine()
    monkeypatch.setattr(
        "oprd_tune.rollout.vllm.policy_weights.PolicyWeights.shapes",
        lambda self: {"model.layers.4.mlp.up_proj.weight": (1,)},
    )
    with pytest.raises(ConfigError, match="which does not fit: only one of it and the student has"):
        make_engine()


def test_a_server_that_hangs_is_lost_in_time(make_engine, server):
    _, engine = make_engine(timeout=2.0)
    engine.sync_weights(0)
    os.killpg(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(RolloutError, match="no vLLM server is left; .* no answer to .* within 2 seconds"):
            engine.generate(PROMPTS)
    finally:
        os.killpg(server.pid, signal.SIGCONT)


def test_a_server_that_does_not_start_shows_its_log(tmp_path):
    process = ServerProcess(tmp_path, ["--no-such-argument"], ENVIRONMENT, tmp_path / "log")
    with pytest.raises(
        ConfigError, match="(?s)vLLM's server ended; from .*log:\napi_server.py: error: .*no-such-argument"
    ):
        process.wait_until_ready(60)


def test_a_rollout_ahead_is_proven_before_the_student_changes(make_engine, monkeypatch):
    model, engine = make_engine(temperature=1.0, ahead=1)
    engine.sync_weights(0)
    engine.ask(PROMPTS, stream=1)
    engine.prove()
    move(model, "w1")
    taken = engine.take()
    assert (taken.policy_version, len(taken)) == (0, len(PROMPTS))
    assert 0 < taken.logprob_gap.largest < 1e-3
    assert engine.take() is None
    engine.ask(PROMPTS, stream=2)  # servers still have the weights before the change
    with pytest.raises(RolloutError, match="the rollout of policy version 0 is not the student's"):
        engine.prove()
    assert engine.take() is None
