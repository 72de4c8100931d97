"""Taps and the streamed loss against Eq. 6 written out, on students prepared in every way that `load_student` knows."""

from functools import cache, partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtune.modules.peft import set_trainable_params

from oprd_tune.config import OPRDSettings
from oprd_tune.losses import HiddenStateMSE
from oprd_tune.losses.masking import select_states
from oprd_tune.modeling.adapters import adapter_names
from oprd_tune.modeling.sharding import Sharding, gathered
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.modeling.weights import load_decoder
from oprd_tune.ranks import Ranks
from oprd_tune.teacher import FrozenTeacher
from oprd_tune.tiny import checkpointer, lora_tiny_qwen2, tiny_qwen2
from oprd_tune.training.gradients import backward
from oprd_tune.training.student import load_student
from oprd_tune.types import LayerPair

CPU, DEPTH, WIDTH = torch.device("cpu"), 4, 128
BUILDERS = {
    "full": tiny_qwen2,
    "lora": partial(lora_tiny_qwen2, lora_rank=4),
    "dora": partial(lora_tiny_qwen2, lora_rank=4, use_dora=True),
}
PAIRS = [LayerPair(2, 2), LayerPair(3, 2), LayerPair(4, 4)]
# Two microbatches of one row, with responses at different places.
TOKENS = torch.randint(2, 16, (2, 1, 9), generator=torch.Generator().manual_seed(1))
MASKS = torch.zeros(2, 1, 9, dtype=torch.bool)
MASKS[0, :, 4:], MASKS[1, :, 2:6] = True, True
COUNT = int(MASKS.sum())


pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The checkpoints by name."""
    return {name: checkpointer(name, str(tmp_path_factory.mktemp(name))) for name in ("student", "teacher")}


@pytest.fixture(scope="module")
def teacher(files):
    return load_decoder(tiny_qwen2, files["teacher"], dtype=torch.float32, device=CPU)


def named(model):
    """Parameters by the names that they have in a plain model."""
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in model.named_parameters()}


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradients(model):
    return {name: local(value.grad) for name, value in named(model).items() if value.grad is not None}


@torch.no_grad()
def with_moved_adapters(model):
    """At their start, half of the adapters have no gradient."""
    generator = torch.Generator().manual_seed(2)
    parameters = named(model)
    for name in sorted(adapter_names(model)):
        value = local(parameters[name])
        noise = torch.randn(value.shape, generator=generator)
        value.copy_(value * (1 + 0.2 * noise) if "magnitude" in name else 0.05 * noise)
    return model


def states_by_hand(model, tokens_BS):
    """The blocks' outputs by layer; in the place of the last one's, that of the final norm."""
    states, hooks = {}, []
    for layer, module in enumerate([*model.layers[:-1], model.norm], start=1):
        hook = module.register_forward_hook(lambda *call, layer=layer: states.update({layer: call[2]}))
        hooks.append(hook)
    model(tokens_BS)
    for hook in hooks:
        hook.remove()
    return states


@pytest.fixture(scope="module")
def by_hand(files, teacher):
    """Gives the loss and the gradients of a plain model, by name of its builder."""

    @cache
    def of(trained):
        model = load_decoder(BUILDERS[trained], files["student"], dtype=torch.float32, device=CPU)
        if adapters := adapter_names(model):
            set_trainable_params(with_moved_adapters(model), adapters)
        loss = 0.0
        for tokens_BS, mask_BS in zip(TOKENS, MASKS, strict=True):
            with torch.no_grad():
                targets = states_by_hand(teacher, tokens_BS)
            states = states_by_hand(model, tokens_BS)
            for pair in PAIRS:
                error_BS = (states[pair.student] - targets[pair.teacher]).square().sum(-1) / WIDTH
                loss = loss + error_BS[:, :-1][mask_BS[:, 1:]].sum() / (COUNT * len(PAIRS))
        loss.backward()
        return loss.item(), gradients(model)

    return of


@pytest.fixture
def load(files, monkeypatch):
    """Loads a student as a recipe does."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()

    def of(trained, *, checkpointed, compiled, sharded):
        settings = OPRDSettings(
            "out",
            max_steps=1,
            max_prompt_tokens=1,
            max_new_tokens=1,
            dtype="fp32",
            activation_checkpointing=checkpointed,
            compile=compiled,
        )
        model = load_student(
            BUILDERS[trained],
            files["student"],
            settings,
            top=DEPTH,
            trains_head=False,
            device=CPU,
            sharding=Sharding(Ranks()) if sharded else None,
        )
        return with_moved_adapters(model)

    return of


def tapped(model, teacher):
    """The loss and the gradients as a recipe forms them."""
    frozen = FrozenTeacher(teacher, PAIRS)
    loss = 0.0
    for tokens_BS, mask_BS in zip(TOKENS, MASKS, strict=True):
        selection = select_states(mask_BS)
        targets = frozen.targets(tokens_BS, selection.index_T)
        stream = HiddenStateMSE().stream(PAIRS, targets.states, selection)
        with layer_taps(model, [pair.student for pair in PAIRS], stream):
            loss_sum = model(tokens_BS)
        backward(loss_sum, COUNT)
        loss += loss_sum.item() / COUNT
    return loss, gradients(model)


def assert_same(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        largest = gradient.abs().max().item()
        assert largest > 1e-4
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("checkpointed", [False, True, 2], ids=["kept", "recomputed", "every_2nd_recomputed"])
@pytest.mark.parametrize("trained", BUILDERS)
def test_loss_and_gradients_are_those_of_eq_6(trained, checkpointed, compiled, sharded, load, teacher, by_hand):
    model = load(trained, checkpointed=checkpointed, compiled=compiled, sharded=sharded)
    assert_same(tapped(model, teacher), by_hand(trained))
    wrapped = [isinstance(block, CheckpointWrapper) for block in model.layers]
    assert wrapped == {False: [False] * 4, True: [True] * 4, 2: [False, True, False, True]}[checkpointed]
    assert (counters["stats"]["unique_graphs"] > 0) == compiled
    assert all(isinstance(block, FSDPModule) == sharded for block in model.layers)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_taps_fire_on_a_model_that_has_run_without_them(compiled, sharded, load, teacher, by_hand):
    model = load("full", checkpointed=False, compiled=compiled, sharded=sharded)
    with torch.no_grad(), gathered(model):
        model(TOKENS[0])
    assert_same(tapped(model, teacher), by_hand("full"))
