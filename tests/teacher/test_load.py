"""Teachers as they are loaded: cut, offloaded, quantised, sharded. What they give is that of the plain model."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.sharding import Sharding
from oprd_tune.modeling.taps import collect_states
from oprd_tune.modeling.weights import load_decoder
from oprd_tune.ranks import Ranks
from oprd_tune.teacher import FrozenTeacher, TeacherPlan, load_teacher
from oprd_tune.teacher.quantize import Int8Linear, quantize_linears
from oprd_tune.tiny import checkpointer, tiny_qwen2
from oprd_tune.types import LayerPair

CPU = torch.device("cpu")
CUDA = pytest.param(torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEPTH, INT8 = 4, "int8_weight_only"
LAYERS = list(range(1, DEPTH + 1))
TOKENS = torch.randint(2, 16, (2, 9), generator=torch.Generator().manual_seed(1))
PROMPTS = [[3, 12, 5, 13], [7, 2, 9, 12, 4, 4, 8, 13, 10], [6, 13]]


@pytest.fixture
def files(tmp_path):
    return checkpointer("teacher", str(tmp_path))


def load(files, *, device=CPU, dtype=torch.float32, **kwargs):
    return load_teacher(tiny_qwen2, files, dtype=dtype, device=device, **kwargs)


def plain(files, *, device=CPU):
    return load_decoder(tiny_qwen2, files, dtype=torch.float32, device=device)


def states(model, tokens=TOKENS):
    """Every layer's states, the top one's after the final norm."""
    everywhere = torch.arange(tokens.numel(), device=tokens.device)
    return collect_states(model, tokens, [(layer, everywhere, None) for layer in range(1, len(model.layers) + 1)])


def assert_same_states(got, want):
    assert len(got) == len(want) == DEPTH
    assert all(map(torch.equal, got, want))


@torch.no_grad()
def test_a_plain_teacher_is_the_decoder_frozen(files):
    teacher, errors = load(files)
    assert errors == {}
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(teacher(TOKENS), plain(files)(TOKENS))


def test_a_teacher_is_read_up_to_the_layer_that_is_needed(files):
    teacher, _ = load(files, top=2)
    assert len(teacher.layers) == 2
    assert isinstance(teacher.norm, nn.Identity)
    assert not any(name.startswith(("layers.2", "layers.3", "norm")) for name in teacher.state_dict())
    assert all(map(torch.equal, states(teacher), states(plain(files))[:2]))
    whole, _ = load(files, top=DEPTH)
    assert_same_states(states(whole), states(plain(files)))


class _CopyingTo(TorchFunctionMode):
    """Lets `tensor.to(device)` copy also where the device is the tensor's own."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result.clone() if func is torch.Tensor.to else result


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_an_offloaded_teachers_blocks_visit_the_device_one_at_a_time(files, device):
    teacher, _ = load(files, device=device, offloaded=True)
    weights = [block.attn.q_proj.weight for block in teacher.layers]
    homes, visits = [weight.data_ptr() for weight in weights], []

    def note(*_):
        visits.append([weight.data_ptr() == home for weight, home in zip(weights, homes, strict=True)])

    for block in teacher.layers:
        block.register_forward_pre_hook(note)
    with _CopyingTo():
        got = states(teacher, TOKENS.to(device))
    assert_same_states(got, states(plain(files, device=device), TOKENS.to(device)))
    assert visits == [[other != layer for other in range(DEPTH)] for layer in range(DEPTH)]
    assert [weight.data_ptr() for weight in weights] == homes
    assert all(parameter.device == CPU for parameter in teacher.layers.parameters())


def errors_by_hand(got, want):
    """‖g_quantised − g‖ / ‖g‖ by layer, over prompts that were run one by one."""
    by_prompt = [[states(model, torch.tensor([prompt])) for prompt in PROMPTS] for model in (got, want)]
    quantised, reference = ([torch.cat(layer) for layer in zip(*part, strict=True)] for part in by_prompt)
    return {n: ((q - r).norm() / r.norm()).item() for n, (q, r) in enumerate(zip(quantised, reference, strict=True), 1)}


@pytest.mark.parametrize("top", [2, DEPTH])
def test_the_error_of_quantisation_is_that_of_the_states_without_padding(files, top):
    teacher, errors = load(files, top=top, quantization=INT8, prompts=PROMPTS)
    exact, _ = load(files, top=top)
    assert list(errors) == list(range(1, top + 1))
    assert all(0 < error < 0.05 for error in errors.values())
    assert errors == pytest.approx(errors_by_hand(teacher, exact), rel=1e-3)


def test_a_sharded_int8_teacher_gives_the_unsharded_states(files, process_group):
    teacher, errors = load(files, quantization=INT8, prompts=PROMPTS, sharding=Sharding(Ranks()))
    whole = plain(files)
    for block in whole.layers:
        quantize_linears(block, INT8, sharded=True)
    head = teacher.output.tied_module.weight
    assert not isinstance(head, DTensor)
    assert all(isinstance(block, FSDPModule) for block in teacher.layers)
    assert isinstance(teacher.layers[0].mlp.w1, Int8Linear)
    assert teacher.layers[0].mlp.w1.weight.to_local().dtype == torch.int8
    assert errors == pytest.approx(errors_by_hand(whole, plain(files)), rel=1e-3)

    everywhere = torch.arange(TOKENS.numel())
    targets = FrozenTeacher(teacher, [LayerPair(layer, layer) for layer in LAYERS]).targets(TOKENS, everywhere)
    assert_same_states([targets.states[layer] for layer in LAYERS], states(whole))
    assert not torch.equal(targets.states[1], states(plain(files))[0])


def test_a_sharded_teacher_gives_the_unsharded_states(files, process_group):
    teacher, errors = load(files, sharding=Sharding(Ranks()))
    assert errors == {}
    assert isinstance(teacher.layers[0].mlp.w1.weight, DTensor)
    assert_same_states(states(teacher), states(plain(files)))


@pytest.mark.parametrize(
    ("placement", "quantization", "ranks", "message"),
    [
        ("remote", None, 2, "teacher_placement is 'remote'; allowed are replicated, sharded, offloaded"),
        ("offloaded", INT8, 2, "teacher_quantization and teacher_placement=offloaded do not go together"),
        ("replicated", "int7", 1, "teacher_quantization=int7 is unknown; allowed: null, int8_weight_only"),
        ("sharded", "int7", 2, "teacher_quantization=int7 is unknown; allowed: null, int8_weight_only"),
        ("sharded", "int8_dynamic", 2, "teacher_quantization=int8_dynamic: .* cannot be sharded"),
    ],
)
def test_mistakes_are_found_before_weights_are_read(placement, quantization, ranks, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        TeacherPlan(placement, quantization, Ranks(0, ranks))


@pytest.mark.parametrize(
    ("placement", "quantization", "ranks"),
    [
        ("replicated", None, 1),
        ("offloaded", None, 1),
        ("sharded", None, 1),
        ("sharded", None, 2),
        ("replicated", INT8, 1),
        ("sharded", INT8, 2),
        ("sharded", "int8_dynamic", 1),
    ],
)
def test_what_goes_together_passes(placement, quantization, ranks):
    plan = TeacherPlan(placement, quantization, Ranks(0, ranks))
    assert plan.sharded == (placement == "sharded" and ranks > 1)


@pytest.mark.parametrize("quantization", [None, INT8])
@torch.no_grad()
def test_over_one_process_a_sharded_teacher_is_a_replicated_one(files, quantization):
    loaded = (
        TeacherPlan(placement, quantization, Ranks()).load(
            tiny_qwen2, files, dtype=torch.float32, top=2, prompts=PROMPTS
        )
        for placement in ("sharded", "replicated")
    )
    (sharded, errors), (replicated, other_errors) = loaded
    assert errors == other_errors
    assert len(errors) == (0 if quantization is None else 2)
    assert not any(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    assert len(sharded.layers) == 2
    assert all(map(torch.equal, states(sharded), states(replicated)))


def test_a_plan_loads_an_offloaded_teacher(files):
    plan = TeacherPlan("offloaded", None, Ranks())
    teacher, errors = plan.load(tiny_qwen2, files, dtype=torch.float32, top=None, prompts=PROMPTS)
    assert errors == {}
    assert all(block._forward_pre_hooks for block in teacher.layers)
    assert_same_states(states(teacher), states(plain(files)))
