"""Norms that PyTorch can fuse compute what torchtune's compute."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torchtune.models.qwen2 import qwen2
from torchtune.modules import RMSNorm

from oprd_tune.modeling.families.qwen3 import lora_qwen3, qwen3
from oprd_tune.modeling.norms import FusedRMSNorm
from oprd_tune.modeling.weights import build_on_meta
from oprd_tune.tiny import lora_tiny_qwen2, tiny_qwen2
from tests.conftest import make_model

QWEN3 = {"vocab_size": 9, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "embed_dim": 16}
QWEN3 |= {"intermediate_dim": 24, "max_seq_len": 32}
D = 1536


def results(norm, x, gradient):
    """The output, and the gradients of input and weight."""
    x = x.clone().requires_grad_()
    y = norm(x)
    return y.detach(), *torch.autograd.grad(y, [x, norm.scale], gradient)


def both(dtype):
    """torchtune's norm, ours with the same weight, an input, and a gradient."""
    torch.manual_seed(0)
    theirs, ours = RMSNorm(D, eps=1e-5).to(dtype), FusedRMSNorm(D, eps=1e-5).to(dtype)
    with torch.no_grad():
        theirs.scale.add_(0.1 * torch.randn(D))
        ours.scale.copy_(theirs.scale)
    return theirs, ours, (3 * torch.randn(40, D)).to(dtype), torch.randn(40, D).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_torchtunes(dtype):
    theirs, ours, x, gradient = both(dtype)
    assert all(map(torch.equal, results(theirs, x, gradient), results(ours, x, gradient)))


def test_numbers_are_as_near_to_fp64_as_torchtunes():
    theirs, ours, x, gradient = both(torch.bfloat16)
    x64, scale64 = x.double().requires_grad_(), ours.scale.detach().double().requires_grad_()
    y64 = F.rms_norm(x64, (D,), scale64, 1e-5)
    exact = [y64.detach(), *torch.autograd.grad(y64, [x64, scale64], gradient.double())]
    for mine, its, wanted in zip(results(ours, x, gradient), results(theirs, x, gradient), exact, strict=True):
        errors = [(torch.dist(found.double(), wanted) / wanted.norm()).item() for found in (mine, its)]
        assert errors[0] <= 1.05 * errors[1]
        assert errors[0] < 0.0025  # bf16 has 8 bits


def test_a_weight_of_another_dtype_is_not_rounded():
    theirs, ours, x, _ = both(torch.float32)
    assert torch.equal(ours(x.bfloat16()), theirs(x.bfloat16()))


def fused_and_other_norms(model, tokens):
    with profile(activities=[ProfilerActivity.CPU]) as found, torch.no_grad():
        model(tokens)
    counts = {event.key: event.count for event in found.key_averages()}
    norms = counts.get("aten::rms_norm", 0)
    return counts.get("aten::_fused_rms_norm", 0), norms - counts.get("aten::_fused_rms_norm", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_norm_of_a_model_that_is_built_dispatches_to_the_fused_kernel(dtype):
    tokens = torch.ones(1, 3, dtype=torch.long)
    plain = make_model(2).to(dtype)
    model = build_on_meta(partial(make_model, 2, build=qwen2)).to(dtype)
    model.load_state_dict(plain.state_dict(), assign=True)
    for part in model.modules():
        if hasattr(part, "rope_init"):
            part.rope_init()
    assert fused_and_other_norms(model, tokens) == (5, 0)
    if dtype == torch.bfloat16:
        assert fused_and_other_norms(plain, tokens) == (0, 5)
    assert torch.equal(model(tokens), plain(tokens))


@pytest.mark.parametrize(
    "build",
    [tiny_qwen2, lora_tiny_qwen2, partial(qwen3, **QWEN3), partial(lora_qwen3, lora_attn_modules=["q_proj"], **QWEN3)],
)
def test_names_and_shapes_of_parameters_stay(build):
    with torch.device("meta"):
        plain = build()
    fused = build_on_meta(build)
    shapes = [{name: p.shape for name, p in model.state_dict().items()} for model in (plain, fused)]
    assert shapes[0] == shapes[1]
    assert not any(type(module) is RMSNorm for module in fused.modules())
    assert sum(isinstance(module, FusedRMSNorm) for module in fused.modules()) == sum(
        isinstance(module, RMSNorm) for module in plain.modules()
    )
