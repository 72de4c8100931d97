"""Quantised teachers: how far off they are, that int8 shards without loss, and what they take."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchtune.models.qwen2 import qwen2

from oprd_tune.errors import ConfigError
from oprd_tune.ranks import leave_ranks
from oprd_tune.teacher.quantize import SCHEMES, Int8Linear, check_scheme, quantize_linears, quantized_bytes

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
# Between which errors each scheme lies, in both dtypes. The intervals are disjoint; bf16 alone has 0.006.
ERRORS = {"int8_weight_only": (0.009, 0.016), "int8_dynamic": (0.016, 0.025), "float8_weight_only": (0.035, 0.055)}
WIDTH = 256


def make_block(dtype=torch.float32, ffn=704, device="cpu"):
    """A Qwen2 block with weights as small as those of real ones."""
    with torch.device(device):
        model = qwen2(
            vocab_size=4,
            num_layers=1,
            num_heads=4,
            num_kv_heads=2,
            embed_dim=WIDTH,
            intermediate_dim=ffn,
            max_seq_len=32,
        )
    block = model.layers[0].to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for linear in linears(block):
        for parameter in linear.parameters():
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return block


def linears(block):
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def run(block):
    """What a block adds to a small input, so that the residual's rounding does not matter."""
    weight = block.sa_norm.scale
    x = 0.01 * torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(2))
    x = x.to(weight.device, weight.dtype)
    return block(x).float() - x.float()


def quantized(scheme, dtype=torch.float32, *, sharded=False, **kwargs):
    block = make_block(dtype, **kwargs)
    quantize_linears(block, scheme, sharded=sharded)
    return block


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


def held_bytes(tensor):
    """Bytes of a tensor, or of those inside a subclass."""
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return tensor.numel() * tensor.itemsize
    return sum(held_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scheme", "sharded"), [("int8_weight_only", True), *((scheme, False) for scheme in ERRORS)])
def test_a_quantised_block_is_close_but_not_equal(scheme, dtype, sharded):
    lower, upper = ERRORS[scheme]
    block = quantized(scheme, dtype, sharded=sharded)
    assert lower < error(run(block), run(make_block())) < upper
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert all(type(linear.weight) is not nn.Parameter for linear in linears(block))


def test_quantising_changes_no_setting_of_the_process():
    before, state = torch.get_float32_matmul_precision(), torch.get_rng_state()
    for scheme in ERRORS:
        check_scheme(scheme, CPU, sharded=False)
    assert torch.get_float32_matmul_precision() == before == "highest"
    assert torch.equal(torch.get_rng_state(), state)


def test_int8_linear_is_its_formula():
    linear = nn.Linear(48, 7)
    linear.weight.data[3] = 0
    got = Int8Linear.from_linear(linear)
    assert got.weight.dtype == torch.int8
    assert got.weight.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    assert (got.scale > 0).all()
    weight = got.weight.double() * got.scale.double().unsqueeze(1)
    assert ((weight - linear.weight).abs() <= 0.5001 * got.scale.unsqueeze(1)).all()
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(got(x), (x.double() @ weight.T + linear.bias).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear_is_as_accurate_as_torchaos(dtype):
    want = run(make_block())
    ours, theirs = (run(quantized("int8_weight_only", dtype, sharded=sharded)) for sharded in (True, False))
    assert error(ours, want) < 1.05 * error(theirs, want)
    assert 0 < error(ours, theirs) < 0.02


def compare(rank, world_size, store, policy):
    """Under FSDP2 every rank gets the unsharded block's output, from its part of the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        for dtype in DTYPES:
            whole, block = (quantized("int8_weight_only", dtype, sharded=True, ffn=45) for _ in range(2))
            fully_shard(block, mp_policy=policy if dtype == torch.bfloat16 else MixedPrecisionPolicy())
            local = block.mlp.w1.weight.to_local()
            assert local.dtype == torch.int8
            assert len(local) == (45 if world_size == 1 else [23, 22][rank])
            assert len(block.mlp.w1.scale.to_local()) == len(local)
            assert torch.equal(run(block), run(whole))
    finally:
        leave_ranks(together=True)


@pytest.mark.parametrize("policy", [MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)])
def test_one_rank_equals_no_sharding(policy, tmp_path):
    compare(0, 1, tmp_path / "store", policy)


def test_two_ranks_equal_no_sharding(tmp_path):
    mp.spawn(compare, (2, str(tmp_path / "store"), MixedPrecisionPolicy()), nprocs=2)


@pytest.mark.parametrize("scheme", ERRORS)
def test_schemes_that_run_here_pass(scheme):
    check_scheme(scheme, CPU, sharded=False)


def test_int8_may_be_sharded():
    check_scheme("int8_weight_only", CPU, sharded=True)


@pytest.mark.parametrize(
    ("scheme", "sharded", "message"),
    [
        ("int7", False, "is unknown; allowed: null, int8_weight_only, int8_dynamic, float8_weight_only, int4_"),
        ("int8_dynamic", True, "cannot be sharded; allowed: int8_weight_only, or teacher_placement=replicated"),
        ("float8_weight_only", True, "cannot be sharded"),
        (
            "int4_weight_only",
            False,
            r"does not run on cpu here \(\w+: .+\); choose null or one of int8_",
        ),
    ],
)
def test_mistakes_are_found_before_weights_are_read(scheme, sharded, message):
    with pytest.raises(ConfigError, match=f"^teacher_quantization={scheme}.*{message}") as found:
        check_scheme(scheme, CPU, sharded=sharded)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("scheme", "ffn", "dtype"),
    [
        ("int4_weight_only", 96, torch.bfloat16),
        ("int4_weight_only", 704, torch.float32),
        ("int8_dynamic", 16, torch.bfloat16),
    ],
)
def test_linears_that_do_not_fit_are_an_error(scheme, ffn, dtype):
    with pytest.raises(ConfigError, match="^teacher_quantization.* takes .* the teacher has a linear with"):
        quantized_bytes(make_block(ffn=ffn, device="meta"), scheme, dtype)
    with pytest.raises(ConfigError, match="^teacher_quantization.* takes .* the teacher has a linear with"):
        quantized(scheme, dtype, ffn=ffn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [None, *ERRORS])
def test_bytes_are_foreseen(scheme, dtype):
    shapes = make_block(device="meta")  # fp32: what counts is the dtype that is asked for
    predicted = quantized_bytes(shapes, scheme, dtype)
    placements = {None: [], "int8_weight_only": [False, True]}.get(scheme, [False])
    blocks = [quantized(scheme, dtype, sharded=sharded) for sharded in placements] or [make_block(dtype)]
    rows = sum(linear.out_features for linear in linears(shapes))
    for block in blocks:
        held = sum(held_bytes(parameter) for parameter in block.parameters())
        assert held <= predicted <= held + (10 * rows if scheme else 0)


def test_int4_is_padded():
    linear = nn.Linear(1536, 9, device="meta")
    assert quantized_bytes(linear, "int4_weight_only", torch.bfloat16) == 16 * 2048 * (4 + 32 / 64) / 8 + 9 * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="int4's kernel is one of CUDA")
def test_int4_on_cuda():
    check_scheme("int4_weight_only", torch.device("cuda"), sharded=False)
    plain, block = make_block(torch.bfloat16).cuda(), make_block(torch.bfloat16).cuda()
    quantize_linears(block, "int4_weight_only", sharded=False)
    assert 0.03 < error(run(block), run(plain)) < 0.3
    held = sum(held_bytes(parameter) for parameter in block.parameters())
    assert held == quantized_bytes(plain, "int4_weight_only", torch.bfloat16)


def test_every_scheme_is_tested():
    assert SCHEMES.keys() == ERRORS.keys() | {"int4_weight_only"}
