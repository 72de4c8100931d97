import pytest
import torch
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.output import token_logprobs
from oprd_tune.protocols import Policy
from oprd_tune.ranks import Ranks
from oprd_tune.rollout import NativeEngine
from oprd_tune.rollout.native.decoding import incremental_decoding
from oprd_tune.rollout.native.sampler import Sampler
from oprd_tune.rollout.noise import inverse_cdf, sample_noise
from oprd_tune.types import Prompts, SamplingRequest
from tests.conftest import VOCAB, make_model

STOP, PAD = 1, 0


def make_prompts(lengths=(5, 2, 7, 1, 3), first_position=0):
    generator = torch.Generator().manual_seed(3)
    tokens = tuple(tuple(torch.randint(2, VOCAB, (n,), generator=generator).tolist()) for n in lengths)
    return Prompts(tokens, tuple(range(first_position, first_position + len(tokens))), (None,) * len(tokens))


def request(**kwargs):
    return SamplingRequest(
        **{"stop_tokens": [STOP], "pad_id": PAD, "max_prompt_tokens": 7, "max_new_tokens": 12, **kwargs}
    )


def sampler(model, *, temperature=1.0, batch_size=None, **kwargs):
    return Sampler(model, request(**kwargs), temperature=temperature, batch_size=batch_size)


def policy(model, folder=None, *, files=None, dtype=torch.float32, vocabulary=VOCAB, ranks=None):
    return Policy(model, files, dtype, vocabulary, ranks or Ranks(), folder)


def greedy_by_full_forward(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        token = int(model(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
        if token == STOP:
            break
    return tokens


@pytest.mark.parametrize("tied", [True, False])
def test_cached_greedy_equals_full_forward_greedy(tied):
    model = make_model(tied=tied)
    prompts = make_prompts()
    rollout = sampler(model, temperature=0).sample(prompts)
    for row, prompt in enumerate(prompts.tokens):
        length = int(rollout.lengths_B[row])
        assert rollout.tokens_BS[row, :length].tolist() == greedy_by_full_forward(model, prompt, 12)


def test_log_probabilities_are_the_trainers():
    model = make_model()
    rollout = sampler(model, samples_per_prompt=3).sample(make_prompts())
    trainers = token_logprobs(model, rollout.tokens_BS, rollout.response_mask_BS)
    samplers = rollout.sampler_logprobs_BS[rollout.response_mask_BS]
    assert (samplers < -0.1).float().mean() > 0.5
    torch.testing.assert_close(samplers, trainers, rtol=0, atol=1e-5)
    assert rollout.sampler_logprobs_BS[~rollout.response_mask_BS].abs().max() == 0


def test_returns_the_most_probable_tokens_when_asked():
    model, k = make_model(), 3
    rollout = sampler(model, samples_per_prompt=2, top_k_ids=k).sample(make_prompts())
    at = rollout.response_mask_BS[:, 1:]
    top = model(rollout.tokens_BS)[:, :-1][at].softmax(-1).topk(k)
    assert torch.equal(rollout.sampler_top_ids_BSK[:, 1:][at], top.indices)
    torch.testing.assert_close(rollout.sampler_top_mass_BS[:, 1:][at], top.values.sum(-1), rtol=1e-4, atol=1e-6)
    (row,) = rollout.split(10**6)
    assert row.sampler_top_ids_BSK.shape == (*row.tokens_BS.shape, k)
    assert sampler(model).sample(make_prompts()).sampler_top_ids_BSK is None


def test_samples_shared_tokens_only():
    """As from a model whose head has no further rows."""
    rollout = sampler(make_model(), samples_per_prompt=20, vocabulary=7).sample(make_prompts())
    responses = rollout.tokens_BS[rollout.response_mask_BS]
    assert responses.max() == 6
    logits = make_model()(rollout.tokens_BS)[:, :-1, :7][rollout.response_mask_BS[:, 1:]]
    wanted = logits.log_softmax(-1).gather(1, responses[:, None]).squeeze(1)
    torch.testing.assert_close(rollout.sampler_logprobs_BS[rollout.response_mask_BS], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_neither_batching_nor_neighbours_change_what_is_sampled(batch_size):
    model, prompts = make_model(), make_prompts()
    whole = sampler(model, samples_per_prompt=2).sample(prompts, stream=7)
    parts = sampler(model, samples_per_prompt=2, batch_size=batch_size).sample(prompts, stream=7)
    assert torch.equal(whole.tokens_BS, parts.tokens_BS)
    alone = Prompts(prompts.tokens[2:3], prompts.positions[2:3], (None,))
    rows = sampler(model, samples_per_prompt=2).sample(alone, stream=7)
    width = rows.tokens_BS.shape[1]
    assert torch.equal(rows.tokens_BS, whole.tokens_BS[4:6, :width])


@pytest.mark.parametrize("temperature", [0.01, 0.5, 3.0])
def test_any_temperature_samples_tokens_of_the_vocabulary(temperature):
    model = make_model()
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(20)
    rollout = sampler(model, temperature=temperature, samples_per_prompt=8).sample(make_prompts())
    assert rollout.tokens_BS.max() < VOCAB
    cold = sampler(model, temperature=0.01).sample(make_prompts()).tokens_BS
    greedy = sampler(model, temperature=0).sample(make_prompts()).tokens_BS
    assert (cold == greedy).float().mean() > 0.9


def test_a_diverged_student_is_a_clear_message():
    model = make_model()
    with torch.no_grad():
        model.norm.scale.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        sampler(model).sample(make_prompts())


def test_the_cache_takes_memory_as_it_fills():
    model = make_model()
    visible = torch.ones(4, 3, dtype=torch.bool)
    with torch.no_grad(), incremental_decoding(model, visible, 50) as cache:
        model(torch.ones(4, 3, dtype=torch.long), mask=cache.mask(3), input_pos=torch.arange(3).expand(4, 3))
        cache.advance(3)
        widths = [cache._keys_values[0][0].shape[2]]
        cache.keep_rows(torch.tensor([2]))
        for column in range(3, 53):
            model(torch.ones(1, 1, dtype=torch.long), mask=cache.mask(1), input_pos=torch.tensor([[column]]))
            cache.advance(1)
            widths.append(cache._keys_values[0][0].shape[2])
    assert widths[0] < 53 == widths[-1]
    assert len(set(widths)) < 5
    assert cache._keys_values[0][0].shape[0] == 1


def test_seed_stream_and_position_each_change_the_noise():
    base = sample_noise(0, 0, [0, 1], 50)
    assert torch.equal(base[1:], sample_noise(0, 0, [1], 50))
    others = [base[1:], sample_noise(1, 0, [0], 50), sample_noise(0, 1, [0], 50)]
    assert all((other - base[:1]).abs().max() > 0.1 for other in others)
    assert 0 <= base.min() <= base.max() < 1


@pytest.mark.parametrize("size", [1, 5, 256, 257, 1000])
def test_inverse_cdf_is_the_plain_one(size):
    weight = torch.rand(200, size) * (torch.rand(200, size) < 0.3)
    weight[:, size // 2] += 0.1
    noise = torch.rand(200, 1, dtype=torch.float64)
    noise[0], noise[1] = 0, 1 - 2**-53
    cumulative = weight.double().cumsum(1)
    wanted = (cumulative <= noise * cumulative[:, -1:]).sum(1, keepdim=True).clamp(max=size - 1)
    drawn = inverse_cdf(weight, noise)
    assert (drawn != wanted).float().mean() <= 0.005  # a threshold within rounding of a step may fall either way
    assert weight.gather(1, drawn).min() > 0


def test_samples_follow_the_models_distribution():
    model = make_model()
    prompt = (4, 9, 2)
    count = 20_000
    prompts = Prompts((prompt,), (0,), (None,))
    rollout = sampler(model, max_new_tokens=1, samples_per_prompt=count).sample(prompts)
    drawn = rollout.tokens_BS[:, 3].bincount(minlength=VOCAB) / count
    probability = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    deviation = (drawn - probability).abs() / (probability * (1 - probability) / count).sqrt()
    assert deviation.max() < 4.5  # standard deviations; the seed is fixed


def test_responses_end_at_stop_tokens_or_at_the_limit():
    model = make_model()
    rollout = sampler(model, samples_per_prompt=40, stop_tokens=[1, 5, 6, 7, 8]).sample(make_prompts())
    for row in range(len(rollout)):
        response = rollout.tokens_BS[row][rollout.response_mask_BS[row]].tolist()
        stops = [i for i, token in enumerate(response) if token in (1, 5, 6, 7, 8)]
        assert stops in ([], [len(response) - 1])
        assert bool(rollout.truncated_B[row]) == (not stops)
        assert stops or len(response) == 12
        assert rollout.tokens_BS[row, int(rollout.lengths_B[row]) :].eq(PAD).all()
    assert 0 < rollout.truncated_B.float().mean() < 1


@pytest.mark.parametrize(
    "group",
    [
        "tok_embeddings",
        "q_proj.weight",
        "q_proj.bias",
        "k_proj.bias",
        "v_proj.bias",
        "output_proj",
        "sa_norm",
        "mlp_norm",
        "w1",
        "w2",
        "w3",
        "norm.scale",
    ],
)
def test_every_changed_weight_shows_at_once(group):
    model, prompts = make_model(), make_prompts()
    greedy = sampler(model, temperature=0, max_new_tokens=1)
    before = greedy.sample(prompts).sampler_logprobs_BS
    changed = [p for name, p in model.named_parameters() if group in name]
    assert changed
    with torch.no_grad():
        for parameter in changed:
            parameter.mul_(1.5)
    assert (greedy.sample(prompts).sampler_logprobs_BS - before).abs().max() > 1e-4


def test_works_checkpointed_and_compiled_and_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    plain, wrapped = make_model(), make_model()
    training.compile_model(wrapped, verbose=False)
    training.set_activation_checkpointing(wrapped, auto_wrap_policy={TransformerSelfAttentionLayer})
    wrapped.train()
    tokens = [sampler(m).sample(make_prompts()).tokens_BS for m in (plain, wrapped)]
    assert torch.equal(*tokens)
    assert wrapped.training
    assert not any("forward" in layer.attn.__dict__ for layer in wrapped.layers)
    assert wrapped(make_rows()).shape == (1, 3, VOCAB)


def make_rows():
    return torch.tensor([[2, 3, 4]])


def test_rollout_records_prompt_and_policy():
    rollout = sampler(make_model(), samples_per_prompt=2).sample(make_prompts((2, 3), 10), policy_version=17)
    assert rollout.policy_version == 17
    assert rollout.prompt_positions_B.tolist() == [10, 10, 11, 11]


def test_split_keeps_every_row_within_the_budget():
    rollout = sampler(make_model(), samples_per_prompt=3).sample(make_prompts())
    micro_batches = rollout.split(40)
    assert sum(len(m) for m in micro_batches) == len(rollout)
    assert all(m.tokens_BS.numel() <= 40 for m in micro_batches)
    assert sum(m.response_tokens for m in micro_batches) == rollout.response_tokens
    assert len(rollout.split(1)) == len(rollout)


def test_the_engine_samples_what_is_asked_for_under_the_version_of_the_last_sync():
    model, prompts = make_model(), make_prompts()
    engine = NativeEngine(temperature=0.5, batch_size=2)
    engine.start(policy(model), request(samples_per_prompt=2, seed=3, top_k_ids=2))
    wanted = sampler(model, temperature=0.5, samples_per_prompt=2, seed=3, top_k_ids=2).sample(prompts, stream=7)
    for version in (0, 17):
        engine.sync_weights(version)
        rollout = engine.generate(prompts, stream=7)
        assert torch.equal(rollout.tokens_BS, wanted.tokens_BS)
        assert torch.equal(rollout.sampler_top_ids_BSK, wanted.sampler_top_ids_BSK)
        assert rollout.policy_version == version
    assert not torch.equal(engine.generate(prompts, stream=8).tokens_BS, wanted.tokens_BS)


def test_a_call_may_bring_a_request_of_its_own_and_changes_no_later_one():
    model, prompts = make_model(), make_prompts()
    other = request(samples_per_prompt=3, seed=9, max_new_tokens=11, temperature=0.25)
    engine = NativeEngine(temperature=0.5)
    engine.start(policy(model), request(seed=3, top_k_ids=2), other)
    before = engine.generate(prompts, stream=7)
    found = engine.generate(prompts, request=other)
    wanted = sampler(model, temperature=0.25, samples_per_prompt=3, seed=9, max_new_tokens=11).sample(prompts)
    assert torch.equal(found.tokens_BS, wanted.tokens_BS)
    assert found.sampler_top_ids_BSK is None
    own = request(samples_per_prompt=3, seed=9, max_new_tokens=11)
    warmer = engine.generate(prompts, request=own)  # at the engine's own temperature
    assert not torch.equal(warmer.tokens_BS, wanted.tokens_BS)
    assert torch.equal(engine.generate(prompts, stream=7).tokens_BS, before.tokens_BS)


def test_the_engine_holds_nothing_and_takes_as_much_as_its_rows_at_once():
    shape = {"columns": 20, "dtype": torch.float32}
    model, few = make_model(), NativeEngine(batch_size=4)
    assert few.memory_bytes(model, rows=100, **shape) == NativeEngine().memory_bytes(model, rows=4, **shape)
    (held, sampling), (_, fewer) = (few.memory_bytes(model, rows=n, **shape) for n in (4, 2))
    assert held == 0 < sampling == 2 * fewer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "rollout.temperature is -1; it must be a finite number, 0 or above"),
        ({"batch_size": 0}, "rollout.batch_size is 0; it must be a whole number, at least 1"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message):
    with pytest.raises(ConfigError, match=message):
        NativeEngine(**arguments)
