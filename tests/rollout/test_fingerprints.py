"""Not a bit of a parameter may differ unseen, and what engines do to parameters may not count as a difference."""

import hashlib

import pytest
import torch
from torch import nn

from oprd_tune.errors import RolloutError
from oprd_tune.rollout.vllm.fingerprints import Digests, Fingerprints, check_arrived, engine_names, fingerprints_of
from tests.conftest import VOCAB, make_model
from tests.rollout.test_policy_weights import policy_weights, sent

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
PADDED_VOCAB = 64
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
each_tying = pytest.mark.parametrize("tied", [True, False])


def weights_of(folder, dtype, tied=False, depth=1):
    """A student's weights as they are sent, each with memory of its own."""
    return {
        name: w.clone() for name, w in sent(policy_weights(make_model(depth, tied=tied), folder, dtype=dtype)).items()
    }


def passed(checksums, weights):
    assert list(checksums.passing([weights])) == [weights]
    return checksums.by_name


def fused(weights):
    """vLLM's parameters: q, k, v in one, gate and up in one, zero rows below embedding and head."""
    joined = {}
    for name, weight in weights.items():
        for one, parts in FUSED.items():
            for part in parts:
                name = name.replace(f".{part}.", f".{one}.")
        joined[name] = torch.cat([joined[name], weight]) if name in joined else weight
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        joined[name] = nn.functional.pad(joined[name], (0, 0, 0, PADDED_VOCAB - len(joined[name])))
    return joined


class Engine(nn.Module):
    """Holds parameters under dotted names."""

    def __init__(self, weights):
        super().__init__()
        for name, weight in weights.items():
            owner, *path = self, *name.split(".")
            for step in path[:-1]:
                owner = owner._modules.setdefault(step, nn.Module())
            owner.register_parameter(path[-1], nn.Parameter(weight, requires_grad=False))


def differing(one, other):
    assert one.keys() == other.keys()
    return {name for name in one if one[name] != other[name]}


@each_dtype
@each_tying
def test_an_engine_that_has_what_was_sent_has_its_fingerprints(dtype, tied, tmp_path):
    weights = weights_of(tmp_path, dtype, tied, depth=2)
    assert VOCAB < PADDED_VOCAB
    found = fingerprints_of(Engine(fused(weights)), dtype)
    assert passed(Fingerprints(), weights) == found
    assert engine_names(weights) == found.keys()
    assert all(-(2**63) <= value < 2**63 for value in found.values())


@each_dtype
def test_digests_are_sha256_of_what_an_engine_has(dtype, tmp_path):
    weights = weights_of(tmp_path, dtype, depth=2)
    want = {
        name: hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, weight in fused(weights).items()
    }
    assert passed(Digests(), weights) == want
    assert passed(Digests(enabled=False), weights) == {}


@pytest.mark.parametrize("rows", [63, 64, 65, 128])
def test_digests_end_with_a_multiple_of_64_rows(rows):
    weight = torch.randn(rows, 3)
    whole = nn.functional.pad(weight, (0, 0, 0, {63: 1, 64: 0, 65: 63, 128: 0}[rows]))
    want = hashlib.sha256(whole.numpy().tobytes()).hexdigest()
    found = passed(Digests(), {"model.embed_tokens.weight": weight, "lm_head.weight": weight.bfloat16().float()[:1]})
    assert found["model.embed_tokens.weight"] == want
    other = passed(Digests(), {"model.layers.0.mlp.down_proj.weight": weight})
    assert (want in other.values()) == (rows % 64 == 0)


@each_dtype
def test_parts_and_their_memory_layout_change_nothing(dtype, tmp_path):
    weights = weights_of(tmp_path, dtype)
    strided = {name: w.t().contiguous().t() if w.dim() == 2 else w for name, w in weights.items()}
    for make in (Fingerprints, Digests):
        want = passed(make(), weights)
        checksums = make()
        list(checksums.passing({name: w} for name, w in strided.items()))
        assert checksums.by_name == want
        assert passed(checksums, weights) == want  # nothing is left of the pass before


@each_dtype
@each_tying
def test_each_bit_of_each_parameter_counts(dtype, tied, tmp_path):
    """Sign bits too, in even rows and odd ones, at either end of a word; and nothing else changes."""
    weights = weights_of(tmp_path, dtype, tied)
    for make in (Fingerprints, Digests):
        before = passed(make(), weights)
        bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
        for name, weight in weights.items():
            (fused_name,) = engine_names([name])
            flat = weight.view(bits).view(-1)
            for place in sorted({0, 1, len(flat) // 2, len(flat) - weight[-1].numel(), len(flat) - 1}):
                for bit in range(8 * weight.element_size()):
                    kept = flat[place].clone()
                    flat[place] ^= torch.tensor(1).bitwise_left_shift(bit).to(bits)
                    assert differing(passed(make(), weights), before) == {fused_name}, (name, place, bit)
                    flat[place] = kept
        assert passed(make(), weights) == before


@each_dtype
@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 12])
def test_any_width_is_summed_up_to_its_last_bit(dtype, width):
    weight = torch.randn(4, width).to(dtype)
    whole = passed(Fingerprints(), {"model.x.weight": weight})
    for row in range(4):
        for column in range(width):
            other = weight.clone()
            other[row, column] = -other[row, column]
            assert differing(passed(Fingerprints(), {"model.x.weight": other}), whole) == {"model.x.weight"}
    padded = nn.functional.pad(weight, (0, 0, 0, 60))
    assert passed(Fingerprints(), {"model.x.weight": padded}) == whole


@each_dtype
def test_rows_in_another_order_are_seen(dtype, tmp_path):
    weights = weights_of(tmp_path, dtype)
    for make in (Fingerprints, Digests):
        before = passed(make(), weights)
        for name, weight in weights.items():
            for one, other in ((0, 1), (0, len(weight) - 1), (2, 6)):
                order = list(range(len(weight)))
                order[one], order[other] = other, one
                changed = passed(make(), weights | {name: weight[order]})
                assert differing(changed, before) == engine_names([name]), name


@each_dtype
@pytest.mark.parametrize(
    ("one", "other", "joined"),
    [
        ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.qkv_proj.weight"),
        ("self_attn.k_proj.bias", "self_attn.v_proj.bias", "self_attn.qkv_proj.bias"),
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.qkv_proj.weight"),
        ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.gate_up_proj.weight"),
    ],
)
def test_joined_parameters_in_another_order_are_seen(one, other, joined, dtype, tmp_path):
    weights = weights_of(tmp_path, dtype)
    one, other = (f"model.layers.0.{key}" for key in (one, other))
    swapped = {name: weights[{one: other, other: one}.get(name, name)] for name in weights}
    for make in (Fingerprints, Digests):
        assert differing(passed(make(), swapped), passed(make(), weights)) == {f"model.layers.0.{joined}"}


def test_what_an_engine_keeps_in_no_form_has_no_fingerprint():
    engine = Engine({"model.norm.weight": torch.ones(3), "model.layers.0.mlp.down_proj.weight": torch.empty(0)})
    assert fingerprints_of(engine, torch.float32).keys() == {"model.norm.weight"}


def test_an_engine_may_keep_a_parameter_in_a_wider_form(tmp_path):
    weights = weights_of(tmp_path, torch.bfloat16)
    engine = Engine({name: w.float() if "norm" in name else w for name, w in fused(weights).items()})
    assert fingerprints_of(engine, torch.bfloat16) == passed(Fingerprints(), weights)


SENT = {f"layers.{i}.weight": i for i in range(9)}
EMPTY = hashlib.sha256(b"").hexdigest()


def test_what_arrived_passes_seen_in_part_or_whole():
    check_arrived(SENT, SENT, "it")
    check_arrived(SENT, {"layers.3.weight": 3}, "it")
    check_arrived({"a": "x", "b": "y"}, {"a": "x", "b": EMPTY}, "it")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {**SENT, "layers.2.weight": 7},
            "http://a does not have the weights that it was sent: layers.2.weight is stale",
        ),
        ({**SENT, "layers.2.weight": 7, "layers.4.weight": 0}, "layers.2.weight, layers.4.weight are stale"),
        (dict.fromkeys(SENT, -1), "layers.0.weight, .*layers.5.weight and 3 more are stale"),
        ({**SENT, "bias": 0}, "sent: bias is stale"),
        ({}, "sent: all of them are stale"),
        ({"layers.2.weight": EMPTY}, "sent: all of them are stale"),
    ],
)
def test_stale_parameters_are_named(found, message):
    with pytest.raises(RolloutError, match=f"{message}$"):
        check_arrived(SENT, found, "http://a")
