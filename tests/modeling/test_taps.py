import pytest
import torch
from torch import nn
from torchtune import training
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from oprd_tune.modeling.output import token_logprobs
from oprd_tune.modeling.taps import collect_states, cut_after, layer_taps
from tests.conftest import DEPTH, VOCAB, make_model

TOKENS = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def layers_by_hand(model, tokens):
    """Raw block outputs, and the last one after the final norm."""
    state, states = model.tok_embeddings(tokens), {}
    for i, layer in enumerate(model.layers):
        state = layer(state)
        states[i + 1] = state
    states[len(model.layers)] = model.norm(state)
    return states


def tapped(model, layers, tokens=TOKENS):
    """Σ over layers of Σ h³, by taps."""
    seen = {}

    def on_state(layer, state):
        seen[layer] = state
        return sum(s.pow(3).sum() for s in seen.values())

    with layer_taps(model, layers, on_state):
        return seen, model(tokens)


def gradients(model, total):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(total, parameters, allow_unused=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [[1, 2, 3], [3], [1], [2], [1, 3]])
def test_states_and_gradients_are_those_of_layers_run_by_hand(layers, tied):
    model = make_model(tied=tied)
    states, total = tapped(model, layers)
    by_hand = layers_by_hand(model, TOKENS)
    assert list(states) == layers
    for layer in layers:
        assert torch.equal(states[layer], by_hand[layer])
    wanted = gradients(model, sum(by_hand[layer].pow(3).sum() for layer in layers))
    for got, want in zip(gradients(model, total), wanted, strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, want)


@pytest.mark.parametrize("selective", [None, 2])
def test_activation_checkpointing_changes_no_bit(selective):
    plain, wrapped = make_model(), make_model()
    if selective is None:
        training.set_activation_checkpointing(wrapped, auto_wrap_policy={TransformerSelfAttentionLayer})
    else:
        training.apply_selective_activation_checkpointing(wrapped, "selective", selective)
    results = [gradients(model, tapped(model, [1, 2, 3])[1]) for model in (plain, wrapped)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_works_under_per_layer_compile(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    plain, compiled = make_model(), make_model()
    training.compile_model(compiled, verbose=False)
    (states, total), (compiled_states, compiled_total) = (tapped(m, [1, 2, 3]) for m in (plain, compiled))
    for layer, state in states.items():
        torch.testing.assert_close(compiled_states[layer], state, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(plain, total), gradients(compiled, compiled_total), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_works_with_lora():
    model = make_model(build=lora_qwen2, lora_attn_modules=["q_proj", "v_proj"], lora_rank=2, lora_alpha=4)
    set_trainable_params(model, get_adapter_params(model))
    total = tapped(model, [1, 3])[1]
    wanted = gradients(model, sum(layers_by_hand(model, TOKENS)[layer].pow(3).sum() for layer in (1, 3)))
    got = gradients(model, total)
    assert len(got) == 2 * 2 * DEPTH
    for a, b in zip(got, wanted, strict=True):  # the two losses add up in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class _ForbiddenHead(nn.Module):
    def forward(self, state):
        raise AssertionError("the LM head ran")


def test_the_head_never_runs_and_higher_blocks_do_not_either():
    model = make_model(tied=False)
    model.output = _ForbiddenHead()
    tapped(model, [1, 2, 3])
    model.layers[2].forward = _ForbiddenHead().forward
    tapped(model, [1, 2])


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_restored_even_after_an_exception(tied):
    model = make_model(tied=tied)
    before, names = model(TOKENS), list(model.state_dict())

    def fail(layer, state):
        raise RuntimeError("stop")

    for layers in ([1, 2], [1, 2, 3]):
        with pytest.raises(RuntimeError, match="stop"), layer_taps(model, layers, fail):
            model(TOKENS)
    assert torch.equal(model(TOKENS), before)
    assert list(model.state_dict()) == names
    assert not any(layer._forward_hooks for layer in model.layers)


def test_scopes_do_not_nest(model):
    with (
        layer_taps(model, [1, 2, 3], lambda layer, state: state.sum()),
        pytest.raises(RuntimeError, match="already replaced"),
        layer_taps(model, [2], lambda layer, state: state.sum()),
    ):
        pass


@pytest.mark.parametrize("layers", [[], [0], [DEPTH + 1], [2, 1], [1, 1]])
def test_refuses_layers_that_do_not_exist_or_ascend(model, layers):
    with pytest.raises(ValueError, match=f"within 1 to {DEPTH}"), layer_taps(model, layers, lambda _, s: s):
        pass


@pytest.mark.parametrize("top", [1, 2, 3])
def test_a_cut_teacher_gives_the_same_states_from_fewer_weights(top):
    whole, cut = make_model(tied=False), make_model(tied=False)
    cut_after(cut, top)
    index_T = torch.tensor([0, 5, 9])
    wanted = [(layer, index_T, None) for layer in range(1, top + 1)]
    assert all(map(torch.equal, collect_states(cut, TOKENS, wanted), collect_states(whole, TOKENS, wanted)))
    assert len(cut.layers) == top
    assert not any(name.startswith("output") for name in cut.state_dict())
    assert ("norm.scale" in cut.state_dict()) == (top == DEPTH)


def test_the_gradient_does_not_depend_on_the_token_sampled_next(model):
    """OPRD's Theorem 1: under `predict`, the state that predicts a token has not read it."""
    results = []
    for last in (3, 4):
        tokens = TOKENS.clone()
        tokens[:, -1] = last

        def on_state(layer, state):
            return state[:, -2].pow(3).sum()

        with layer_taps(model, [3], on_state):
            results.append(gradients(model, model(tokens)))
    # The embedding rows of the last tokens themselves get no gradient either.
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_token_logprobs_are_those_of_full_logits(tied, monkeypatch):
    monkeypatch.setattr("oprd_tune.modeling.output._ROWS_PER_CHUNK", 3)
    model = make_model(tied=tied)
    mask = torch.zeros_like(TOKENS, dtype=torch.bool)
    mask[0, 2:], mask[1, 4:6] = True, True
    wanted = model(TOKENS).log_softmax(-1)[:, :-1].gather(2, TOKENS[:, 1:, None])[..., 0][mask[:, 1:]]
    torch.testing.assert_close(token_logprobs(model, TOKENS, mask), wanted)
