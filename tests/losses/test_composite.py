"""Several losses from one forward pass."""

from dataclasses import replace

import pytest
import torch

from oprd_tune.errors import ConfigError
from oprd_tune.losses import (
    BridgedMSE,
    Composite,
    FullReverseKL,
    HiddenStateMSE,
    PerTokenLoss,
    SampledReverseKL,
    TopKReverseKL,
)
from oprd_tune.losses.composite import as_composite
from oprd_tune.losses.diagnostics import DIFFERENCES, Probe
from oprd_tune.losses.masking import StateSelector, response_tokens
from oprd_tune.modeling.heads import Heads, LMHead
from oprd_tune.modeling.taps import layer_taps
from oprd_tune.ranks import Ranks
from oprd_tune.rollout import NativeEngine
from oprd_tune.teacher import FrozenTeacher
from oprd_tune.training.gradients import backward
from oprd_tune.types import LayerPair, Rollout
from tests.conftest import DEPTH, VOCAB, WIDTH, make_model
from tests.losses.token_losses import forward_kl
from tests.modeling.bridges import make_bridge

PAIRS = [LayerPair(1, 1), LayerPair(DEPTH, DEPTH)]


def rollout():
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 3:9] = mask[1, 4:6] = True
    return Rollout(
        tokens_BS=torch.randint(0, VOCAB, (2, 9), generator=generator),
        response_mask_BS=mask,
        sampler_logprobs_BS=-torch.rand(2, 9, generator=generator),
        lengths_B=torch.tensor([9, 6]),
        truncated_B=torch.zeros(2, dtype=torch.bool),
        prompt_positions_B=torch.arange(2),
        policy_version=0,
    )


def gradients(loss, *, tied=True, positions="all", pairs=PAIRS, bridge=None):
    """The student's parameter gradients and the parts' sums."""
    student, teacher = make_model(tied=tied), make_model(tied=tied, seed=1)
    heads = Heads(LMHead(student), LMHead(teacher), VOCAB)
    frozen = FrozenTeacher(teacher, pairs, final=True, bridge=bridge)
    batch, select = rollout(), StateSelector(positions, 1)
    tokens, selection = response_tokens(batch), select(batch)
    targets = frozen.targets(batch.tokens_BS, selection.index_T, tokens.index_T)
    stream = loss.stream(targets, tokens, selection, heads=heads, pairs=pairs, bridge=bridge)
    counts_P = torch.tensor(loss.counts(batch, select))
    with layer_taps(student, stream.layers, stream):
        sums_P = student(batch.tokens_BS)
    backward(sums_P, counts_P)
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}, sums_P.detach(), counts_P


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "token_loss",
    [FullReverseKL(), TopKReverseKL(k=4), PerTokenLoss(per_token=forward_kl)],
    ids=["full", "top-k", "forward"],
)
def test_gradients_are_those_of_ordinary_autograd_on_the_whole_model(token_loss, tied):
    """Tied embeddings included: they get gradient from both ends."""
    got, _, _ = gradients(as_composite(token_loss), tied=tied)
    student, teacher = make_model(tied=tied), make_model(tied=tied, seed=1)
    batch = rollout()
    at = batch.response_mask_BS[:, 1:]
    log_p, log_q = (m(batch.tokens_BS)[:, :-1][at].log_softmax(-1) for m in (student, teacher))
    log_q = log_q.detach()
    if isinstance(token_loss, TopKReverseKL):
        ids = log_p.topk(4).indices
        log_p, log_q = log_p.gather(1, ids).log_softmax(-1), log_q.gather(1, ids).log_softmax(-1)
    if isinstance(token_loss, PerTokenLoss):
        log_p, log_q = log_q, log_p
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("positions", ["all", "last"])
def test_it_is_the_weighted_sum_of_its_parts_each_over_its_own_count(positions):
    parts = {"opd": FullReverseKL(), "oprd": HiddenStateMSE()}
    together, sums_P, counts_P = gradients(Composite(parts, {"oprd": 3.0}), positions=positions)
    assert counts_P.tolist() == ([8, 8] if positions == "all" else [8, 2])
    opd, opd_sum, _ = gradients(Composite({"opd": parts["opd"]}), positions=positions)
    oprd, oprd_sum, _ = gradients(
        Composite({"opd": FullReverseKL(), "oprd": parts["oprd"]}, {"opd": 0.0, "oprd": 3.0}), positions=positions
    )
    torch.testing.assert_close(sums_P, torch.cat([opd_sum, oprd_sum[1:]]))
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, opd[name] + oprd[name], rtol=1e-4, atol=1e-7)


def test_response_tokens_stand_one_place_after_the_states_that_predict_them():
    batch = rollout()
    top_ids = torch.arange(2 * 9 * 2).view(2, 9, 2)
    tokens = response_tokens(replace(batch, sampler_top_ids_BSK=top_ids, sampler_top_mass_BS=top_ids[..., 0] / 100))
    assert tokens.index_T.tolist() == [2, 3, 4, 5, 6, 7, 9 + 3, 9 + 4]
    at = tokens.index_T + 1
    assert torch.equal(tokens.tokens_T, batch.tokens_BS.flatten()[at])
    assert torch.equal(tokens.sampler_logprobs_T, batch.sampler_logprobs_BS.flatten()[at])
    assert torch.equal(tokens.sampler_top_ids_TK, top_ids.flatten(0, 1)[at])
    assert torch.equal(tokens.sampler_top_mass_T, (top_ids[..., 0] / 100).flatten()[at])


def test_a_hidden_part_may_compare_over_a_bridge():
    bridge = make_bridge(PAIRS, WIDTH, WIDTH)
    hidden = BridgedMSE("variance")
    _, (_, bridged), (_, count) = gradients(Composite({"opd": FullReverseKL(), "oprd": hidden}), bridge=bridge)
    student, teacher = make_model(), FrozenTeacher(make_model(seed=1), PAIRS, bridge=bridge)
    selection = StateSelector()(rollout())
    targets = teacher.targets(rollout().tokens_BS, selection.index_T)
    stream = hidden.stream(PAIRS, targets.states, selection, bridge)
    with layer_taps(student, stream.layers, stream):
        total = student(rollout().tokens_BS)
    assert bridged == total > 0
    assert count == len(selection) == 8


def measured(loss, *, pairs=(), probed=False):
    """What a composite logs."""
    student, teacher = make_model(), make_model(seed=1)
    heads, batch = Heads(LMHead(student), LMHead(teacher), VOCAB), rollout()
    tokens, selection = response_tokens(batch), StateSelector()(batch)
    frozen = FrozenTeacher(teacher, pairs, final=True)
    targets = frozen.targets(batch.tokens_BS, selection.index_T, tokens.index_T)
    probe = Probe(heads, targets.final_TC, tokens, batch, count=len(tokens), k=9) if probed else None
    stream = loss.stream(targets, tokens, selection, heads=heads, pairs=pairs, probe=probe)
    with layer_taps(student, stream.layers, stream):
        student(batch.tokens_BS)
    return stream.metrics


def test_metrics_of_several_token_parts_are_kept_apart():
    logged = measured(Composite({"few": TopKReverseKL(k=2), "many": TopKReverseKL(k=9)})).reduce(Ranks())
    assert 0 < logged["token/few/student_mass"] < logged["token/many/student_mass"] < 1
    assert not any(name.startswith("token/s") for name in logged)


def test_metrics_are_those_of_all_parts_and_the_probe():
    loss = Composite({"opd": TopKReverseKL(k=9), "oprd": HiddenStateMSE()})
    logged = measured(loss, pairs=PAIRS, probed=True).reduce(Ranks())
    assert logged["diagnostics/student_mass"] == pytest.approx(logged["token/student_mass"], rel=1e-5)
    assert {f"layers/{kind}_0{layer}" for kind in ("mse", "cosine") for layer in (1, DEPTH)} < logged.keys()
    without = measured(loss, pairs=PAIRS).reduce(Ranks())
    assert logged.items() > without.items()
    assert not any(name.startswith("diagnostics") for name in without)


def test_a_probe_notes_where_the_models_differ_most():
    found = measured(Composite({"opd": FullReverseKL()}), probed=True).notes[DIFFERENCES]
    student, teacher, batch = make_model(), make_model(seed=1), rollout()
    log_p, log_q = (model(batch.tokens_BS).log_softmax(-1) for model in (student, teacher))
    kl_BS = (log_p.exp() * (log_p - log_q)).sum(-1)
    places = [(row, column) for row, column in batch.response_mask_BS.nonzero().tolist()]
    places.sort(key=lambda place: -kl_BS[place[0], place[1] - 1])
    assert len(found) == len(places) == 8
    for difference, (row, column) in zip(found, places, strict=True):
        assert difference.kl == pytest.approx(kl_BS[row, column - 1].item(), rel=1e-4)
        assert [*difference.before, difference.token] == batch.tokens_BS[row, : column + 1].tolist()
        for candidates, log in ((difference.student, log_p), (difference.teacher, log_q)):
            top = log[row, column - 1].exp().topk(3)
            assert [token for token, _ in candidates] == top.indices.tolist()
            assert [share for _, share in candidates] == pytest.approx(top.values.tolist(), rel=1e-4)


def test_a_hidden_part_below_the_top_reaches_the_loss_too():
    loss = Composite({"opd": FullReverseKL(), "oprd": HiddenStateMSE()}, {"opd": 0.0})
    got, _, _ = gradients(loss, pairs=[LayerPair(1, 1)])
    assert got["layers.0.mlp.w1.weight"].abs().max() > 1e-4
    assert got["layers.2.mlp.w1.weight"].abs().max() == 0


def test_wants_as_many_of_the_sampler_s_tokens_as_its_hungriest_part():
    parts = {
        "a": TopKReverseKL(k=3, support="sampler"),
        "b": TopKReverseKL(k=5, support="sampler"),
        "c": FullReverseKL(),
    }
    assert Composite(parts).sampler_top_k == 5
    assert Composite({"c": FullReverseKL()}).sampler_top_k == Composite({"h": HiddenStateMSE()}).sampler_top_k == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Composite({}), "loss.parts is empty"),
        (
            lambda: Composite({"a": FullReverseKL()}, {"a": -1.0}),
            "loss.weights.a is -1.0; it must be a finite number, 0 or above",
        ),
        (lambda: Composite({"a": FullReverseKL()}, {"b": 1.0}), "loss.weights names b; the parts are a"),
        (lambda: Composite({"a": 3}), "loss.parts.a is no loss but 3"),
        (lambda: Composite({"top-k": FullReverseKL()}), "loss.parts has 'top-k'; a name is letters, digits and _"),
        (lambda: Composite({"total": FullReverseKL()}), "and not `total`"),
        (lambda: Composite({"a": HiddenStateMSE(), "b": HiddenStateMSE()}), "more than one loss on hidden states"),
        (lambda: Composite({"a": TopKReverseKL(k=16)}).check(8, NativeEngine()), "k is 16"),
        (
            lambda: Composite({"a": SampledReverseKL()}).check(8, NativeEngine(temperature=0.5)),
            "rollout.temperature 0.5",
        ),
    ],
)
def test_mistakes_are_explained(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
