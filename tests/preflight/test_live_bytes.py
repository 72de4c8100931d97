"""Bytes that are alive, and what preflight predicts of them."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchtune.models.qwen2 import qwen2

from oprd_tune.losses import BridgedMSE, Composite, ForwardKL, FullReverseKL, HiddenStateMSE, ReferenceCrossEntropy
from oprd_tune.losses.masking import select_states
from oprd_tune.modeling.heads import Heads
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.preflight.live_bytes import LiveBytes
from oprd_tune.preflight.memory import predict_memory, reading_bytes
from oprd_tune.selection import ResponseTokens
from oprd_tune.teacher import FrozenTeacher
from oprd_tune.types import LayerPair
from tests.modeling.bridges import make_bridge
from tests.preflight.test_preflight import PLAN, SETTINGS

ROWS, COLUMNS, WIDTH, DEPTH, RANK = 4, 100, 64, 12, 4
BUILD = partial(
    qwen2,
    vocab_size=40,
    num_layers=DEPTH,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=WIDTH,
    intermediate_dim=160,
    max_seq_len=COLUMNS,
    tie_word_embeddings=True,
)
PAIRS = [LayerPair(layer, layer) for layer in range(1, DEPTH + 1)]


def test_memory_counts_once_and_until_it_is_free():
    given = torch.ones(1000)
    with LiveBytes([given]) as live:
        doubled = given * 2
        view = doubled.view(10, 100)[:5]
        assert live.peak == 4000
        del doubled
        more = view + 1  # the view keeps the whole
        assert live.peak == 6000
        del view, more
        given.double()
        assert live.peak == 8000


class Late(dict):
    """Targets that come into being when the student's tap asks for them."""

    def pop(self, layer):
        return torch.zeros(ROWS * COLUMNS, WIDTH)


def update_bytes(bridge, checkpointing, *, late=False):
    """The most bytes of one update beside parameters and their gradients. `late`: with targets one layer at a time."""
    torch.manual_seed(0)
    student, teacher = BUILD(), BUILD()
    for number in range(0, DEPTH, checkpointing or DEPTH + 1):
        student.layers[number] = checkpoint_wrapper(student.layers[number], preserve_rng_state=False)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(0, 40, (ROWS, COLUMNS))
    selection = select_states(torch.ones(ROWS, COLUMNS, dtype=torch.bool), anchor="consume")
    frozen = FrozenTeacher(teacher, PAIRS[-1:] if late else PAIRS, bridge=bridge)
    loss = HiddenStateMSE() if bridge is None else BridgedMSE()
    there = [p for model in (student, teacher) for p in (*model.parameters(), *model.buffers())]
    there += [p.grad for p in student.parameters()]
    with LiveBytes([*there, tokens, selection.index_T, selection.part_T, selection.teacher_index_T]) as live:
        states = frozen.targets(tokens, selection.teacher_index_T).states
        if late:
            states = Late()
        stream = loss.stream(PAIRS, states, selection, bridge)
        with layer_taps(student, stream.layers, stream):
            total = student(tokens)
        total.backward()
    return live.peak


@pytest.mark.parametrize("checkpointing", [0, 1])
@pytest.mark.parametrize("bridged", [False, True])
def test_an_update_takes_what_preflight_predicts(bridged, checkpointing):
    bridge = make_bridge(PAIRS, WIDTH, WIDTH, rank=RANK) if bridged else None
    plan = replace(
        PLAN,
        settings=replace(SETTINGS, activation_checkpointing=checkpointing),
        rows=ROWS,
        row_tokens=COLUMNS,
        selected=ROWS * COLUMNS,
        tapped=DEPTH,
        teacher_width=WIDTH,
        target_width=RANK if bridged else WIDTH,
        bridge_bytes=1 if bridged else 0,
    )
    predicted = predict_memory(BUILD(), BUILD, plan)
    measured = update_bytes(bridge, checkpointing)
    assert predicted.training - predicted.gradients == pytest.approx(measured, rel=0.08)


def test_a_bridge_saves_the_gradients_that_would_wait():
    plain, bridged = update_bytes(None, 1), update_bytes(make_bridge(PAIRS, WIDTH, WIDTH, rank=RANK), 1)
    gradients = DEPTH * ROWS * COLUMNS * (WIDTH - RANK) * 4
    assert plain - bridged > gradients / 2  # the largest moment is some blocks later, when a part is used


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_targets_of_all_layers_cost_nothing_at_the_peak(checkpointing):
    """What the taps free of them makes room for the gradients that wait, so it would not help to have them later."""
    assert update_bytes(None, checkpointing, late=True) == pytest.approx(update_bytes(None, checkpointing), rel=0.01)


@pytest.mark.parametrize("more", [{}, {"sft": ReferenceCrossEntropy}, {"sft": ReferenceCrossEntropy, "fwd": ForwardKL}])
def test_each_token_loss_of_a_composite_keeps_a_gradient_of_the_head(more):
    """Chunks of logits come one after the other, gradients of the head wait together."""
    vocabulary, width, count = 20_000, 64, 16
    loss = Composite({"kl": FullReverseKL(chunk_tokens=8), **{k: make(chunk_tokens=8) for k, make in more.items()}})
    weights = [torch.randn(vocabulary, width).requires_grad_(), torch.randn(vocabulary, width)]
    heads = Heads(*(SimpleNamespace(layer=1, weight_VD=weight_VD) for weight_VD in weights), vocabulary)
    state_BSD, teacher_TC = torch.randn(1, count, width).requires_grad_(), torch.randn(count, width)
    index_T = torch.arange(count)
    tokens = ResponseTokens(index_T, index_T, torch.zeros(count), given_T=index_T % 2 == 0, teacher_index_T=index_T)
    weights[0].grad = torch.zeros_like(weights[0])
    with LiveBytes([*weights, weights[0].grad, state_BSD, teacher_TC]) as live:
        total = sum(part.stream(heads, teacher_TC, tokens)(1, state_BSD) for part in loss.token_losses.values())
        total.backward()
    parts = loss.token_losses.values()
    predicted = sum(part.waiting_bytes(vocabulary, width) for part in parts)
    predicted += max(part.working_bytes(vocabulary, width) for part in parts)
    assert len(parts) * vocabulary * width * 4 < live.peak <= predicted


@pytest.mark.parametrize("rows", [1, 4])
def test_a_teachers_pass_takes_what_preflight_predicts(rows):
    """Beside its targets, which are counted elsewhere."""
    teacher = BUILD()
    frozen = FrozenTeacher(teacher, PAIRS[-1:])
    tokens, index_T = torch.randint(0, 40, (rows, COLUMNS)), torch.zeros(1, dtype=torch.long)
    with LiveBytes([*teacher.parameters(), *teacher.buffers(), tokens, index_T]) as live:
        frozen.targets(tokens, index_T)
    predicted = reading_bytes(BUILD, rows=rows, columns=COLUMNS, width=WIDTH, dtype=torch.float32)
    assert predicted == pytest.approx(live.peak, rel=0.1)
    plan = replace(PLAN, rows=1, row_tokens=2, selected=0, tapped=0)
    student = BUILD()
    without = predict_memory(student, BUILD, plan)
    assert predict_memory(student, BUILD, replace(plan, reading_bytes=10**8)).training == without.gradients + 10**8
