"""Rows that are laid end to end give the states, losses and gradients that padded ones give."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention import varlen
from torchtune.models.gemma2 import gemma2
from torchtune.models.qwen2 import qwen2

from oprd_tune.losses import Composite, FullReverseKL, HiddenStateMSE
from oprd_tune.losses.diagnostics import DIFFERENCES, Probe
from oprd_tune.losses.masking import StateSelector, response_tokens
from oprd_tune.modeling import row_attention
from oprd_tune.modeling.families.llama import llama
from oprd_tune.modeling.families.qwen3 import lora_qwen3, qwen3
from oprd_tune.modeling.heads import Heads, LMHead
from oprd_tune.modeling.row_attention import take_rows, takes_rows
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.packing import Packed, filled
from oprd_tune.teacher import FrozenTeacher
from oprd_tune.training.gradients import backward
from oprd_tune.types import LayerPair, Reading, Rollout
from tests.conftest import DEPTH, VOCAB, WIDTH, make_model

PAIRS = [LayerPair(layer, layer) for layer in range(1, DEPTH + 1)]
LENGTHS = (11, 7, 2, 9, 1, 50)
SHAPE = {"vocab_size": VOCAB, "num_layers": DEPTH, "num_heads": 4, "num_kv_heads": 2, "embed_dim": WIDTH}
SHAPE |= {"intermediate_dim": 24, "max_seq_len": 64}
BUILDERS = {
    "qwen2": lambda: qwen2(**SHAPE),
    "qwen3": lambda: qwen3(**SHAPE, head_dim=8),
    "lora": lambda: lora_qwen3(["q_proj", "v_proj"], **SHAPE, head_dim=8),
    "llama": lambda: llama(**SHAPE),
    "scaled": lambda: llama(
        **SHAPE,
        rope_scaling={
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
}


def make_rollout(lengths=LENGTHS):
    rows, width = len(lengths), max(lengths)
    lengths_B = torch.tensor(lengths)
    real_BS = torch.arange(width) < lengths_B[:, None]
    generator = torch.Generator().manual_seed(3)
    tokens_BS = torch.randint(1, VOCAB, (rows, width), generator=generator) * real_BS
    mask_BS = real_BS & (torch.arange(width) >= (lengths_B[:, None] + 1) // 2)
    positions = torch.arange(rows)
    return Rollout(tokens_BS, mask_BS, mask_BS.float(), lengths_B, positions < 0, positions, 0)


def random_model(build, seed=0):
    torch.manual_seed(seed)
    model = build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return take_rows(model)


def learn(rollout, student, teacher, select=None):
    """A step's loss and gradients, of hidden states and of tokens."""
    select = select or StateSelector()
    loss = Composite({"oprd": HiddenStateMSE(), "opd": FullReverseKL(chunk_tokens=7)})
    heads = Heads(LMHead(student), LMHead(teacher), VOCAB)
    frozen = FrozenTeacher(teacher, PAIRS, final=True)
    tokens, selection = select.tokens(rollout), select(rollout)
    where = selection.teacher_index_T, tokens.teacher_index_T
    targets = frozen.targets(rollout.teacher_tokens, *where, packed=rollout.teacher_packed)
    stream = loss.stream(targets, tokens, selection, heads=heads, pairs=PAIRS)
    with layer_taps(student, stream.layers, stream):
        sums_P = rollout.read_by(student)
    backward(sums_P, torch.tensor(loss.counts(rollout, select)))
    return sums_P.detach(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("average", ["tokens", "responses"])
def test_losses_and_gradients_are_those_of_padded_rows(name, average):
    select = StateSelector("last_k", 4, average_over=average)
    padded = learn(make_rollout(), random_model(BUILDERS[name]), random_model(BUILDERS[name], 1), select)
    student = random_model(BUILDERS[name])
    assert takes_rows(student)
    packed = make_rollout().without_padding()
    assert packed.packed is not None
    found = learn(packed, student, random_model(BUILDERS[name], 1), select)
    assert found[0] == pytest.approx(padded[0], rel=1e-12)
    assert found[1].keys() == padded[1].keys()
    for key, gradient in found[1].items():
        torch.testing.assert_close(gradient, padded[1][key], rtol=1e-9, atol=1e-12)


def test_rows_may_be_more_tokens_together_than_a_model_reads():
    lengths = (50, 49) * 20
    student, teacher = random_model(BUILDERS["qwen2"]), random_model(BUILDERS["qwen2"], 1)
    sums_P, _ = learn(make_rollout(lengths).without_padding(), student, teacher)
    expected, _ = learn(make_rollout(lengths), random_model(BUILDERS["qwen2"]), random_model(BUILDERS["qwen2"], 1))
    assert sums_P == pytest.approx(expected, rel=1e-12)


def test_a_teachers_own_reading_is_packed_for_it_alone():
    """It reads one more token before each row."""
    rollout = make_rollout()
    width = rollout.tokens_BS.shape[1]
    longer_BU = torch.cat([torch.full((len(rollout), 1), 5), rollout.tokens_BS], 1)
    column_BS = torch.arange(1, width + 1).expand(len(rollout), -1)
    rollout = replace(rollout, reading=Reading(longer_BU, rollout.lengths_B + 1, column_BS))
    models = [random_model(BUILDERS["qwen2"], seed) for seed in (0, 1, 0, 1)]
    padded, found = learn(rollout, *models[:2]), learn(rollout.without_padding(), *models[2:])
    assert found[0] == pytest.approx(padded[0], rel=1e-12)


def test_a_teacher_that_cannot_reads_padded_rows():
    build = BUILDERS["qwen2"]
    teachers = [random_model(build, 1), random_model(build, 1)]
    teachers[1].layers[0].mask_mod = None
    row_attention.set_attention_call(
        teachers[1].layers[0].attn,
        lambda q, k, v, *, mask, dropout_p, is_causal: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal
        ),
    )
    assert not takes_rows(teachers[1])
    results = [learn(make_rollout().without_padding(), random_model(build), teacher) for teacher in teachers]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)


def test_blocks_that_attend_otherwise_are_left_as_they_are():
    gemma = gemma2(**SHAPE, head_dim=8, hidden_capping_value=30.0, final_capping_value=50.0, sliding_window_size=4)
    assert not takes_rows(take_rows(gemma))
    assert not takes_rows(take_rows(make_model(attn_dropout=0.1)))
    assert not takes_rows(make_model())
    assert takes_rows(take_rows(make_model()))


@pytest.mark.parametrize("how", ["checkpointed", "compiled"])
def test_wrapped_blocks_read_them_too(how):
    plain, wrapped = (random_model(BUILDERS["qwen3"]) for _ in range(2))
    for number, block in enumerate(wrapped.layers):
        if how == "compiled":
            block.compile(backend="aot_eager")
        else:
            wrapped.layers[number] = checkpoint_wrapper(block)
    assert takes_rows(wrapped)
    rollout = make_rollout().without_padding()
    results = [learn(rollout, student, random_model(BUILDERS["qwen3"], 1)) for student in (plain, wrapped)]
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(results[0][1].values(), results[1][1].values(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_gpus_kernel_gets_the_rows_as_it_wants_them(monkeypatch):
    """It cannot run here, so attention by hand stands in its place."""
    asked = {}

    def by_hand(q, k, v, starts, starts_k, longest, longest_k, *, window_size):
        asked.update(starts=starts, longest=longest, window=window_size)
        assert starts is starts_k
        assert longest == longest_k
        found = []
        for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            score = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) / q.shape[-1] ** 0.5
            score = score.masked_fill(~torch.ones(score.shape[1:], dtype=torch.bool).tril(), -torch.inf)
            found.append(torch.einsum("hqk,khd->qhd", score.softmax(-1), v[start:end]))
        return torch.cat(found)

    monkeypatch.setattr(row_attention, "varlen_attn", by_hand)
    monkeypatch.setattr(row_attention, "_has_kernel", lambda q_NHD: True)
    student = random_model(BUILDERS["qwen2"])
    rollout = make_rollout()
    found = rollout.without_padding().read_by(student)[:, 0]
    expected = student(rollout.tokens_BS).flatten(0, 1)[rollout.without_padding().packed.grid_N]
    torch.testing.assert_close(found, expected)
    assert asked["starts"].tolist() == [0, 11, 18, 20, 29, 30, 80]
    assert asked["starts"].dtype == torch.int32
    assert (asked["longest"], asked["window"]) == (50, (-1, 0))


def test_the_kernel_has_the_arguments_that_it_is_called_with():
    import inspect

    names = list(inspect.signature(varlen.varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "window_size" in names


def test_a_look_at_tokens_shows_those_of_their_row():
    rollout = make_rollout()
    student, teacher = random_model(BUILDERS["qwen2"]), random_model(BUILDERS["qwen2"], 1)
    shown = []
    for rows in (rollout, rollout.without_padding()):
        tokens = response_tokens(rows)
        heads = Heads(LMHead(student), LMHead(teacher), VOCAB)
        final_TC = FrozenTeacher(random_model(BUILDERS["qwen2"], 1), [], final=True).targets(
            rows.tokens_BS, tokens.teacher_index_T[:0], tokens.teacher_index_T, packed=rows.packed
        )
        probe = Probe(heads, final_TC.final_TC, tokens, rows, count=10, k=3)
        with torch.no_grad(), layer_taps(student, [DEPTH], lambda _, state, probe=probe: probe(state) or state.sum()):
            rows.read_by(student)
        shown.append([(found.before, found.token) for found in probe.metrics.notes[DIFFERENCES]])
    assert shown[0] == shown[1]
    assert shown[0]


def test_rows_without_padding_are_read_as_they_are():
    rollout = make_rollout((5, 5, 5)).without_padding()
    assert rollout.packed is None
    assert Packed.of(torch.tensor([4]), 4) is None


def test_microbatches_hold_as_many_rows_as_fit():
    lengths = [9, 7, 5, 4, 3, 2, 1, 1]
    assert filled(lengths, 10) == [[0, 6], [1, 4], [2, 3, 7], [5]]
    assert filled([12, 3], 10) == [[0], [1]]
    assert filled([], 10) == []
    micro_batches = make_rollout().split(20, packed=True)
    assert [micro.lengths_B.tolist() for micro in micro_batches] == [[50], [11, 9], [7, 2, 1]]
    assert [micro.packed is None for micro in micro_batches] == [True, False, False]
    assert sorted(torch.cat([micro.prompt_positions_B for micro in micro_batches]).tolist()) == list(range(6))


def test_rows_of_a_packed_microbatch_are_padded_again():
    micro = make_rollout().without_padding()
    assert micro.rows(torch.tensor([0, 1])).packed is None
    assert micro.idle().packed is None
