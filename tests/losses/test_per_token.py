"""Token losses written as a function of two log-probabilities. One is in `LOSSES` of token_losses.py too."""

import weakref

import pytest
import torch
from torch import nn
from torchtune.modules.tied_linear import TiedLinear

from oprd_tune.config.components import Component
from oprd_tune.errors import ConfigError
from oprd_tune.losses import FullReverseKL, PerTokenLoss
from oprd_tune.losses.token_loss import DenseTokenLoss
from oprd_tune.modeling.heads import Heads, LMHead
from tests.losses.token_losses import TOP, Case, D, V, Weight, forward_kl, kl, live_tensors

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def jensen_shannon(log_p, log_q):
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


FUNCTIONS = {
    "forward": forward_kl,
    "reverse": kl,
    "jensen-shannon": jensen_shannon,
    "of few tokens": lambda log_p, log_q: -log_p.gather(1, log_q.topk(3).indices).sum(-1),
    "of every token alike": lambda log_p, log_q: -log_p.mean(-1),  # its gradient has one number in memory
    "squared": lambda log_p, log_q: (log_p - log_q).square().mean(-1),
}


class ForwardKL(DenseTokenLoss):
    """With its gradient worked out by hand."""

    def objective(self, chunk, metrics):
        log_q_TV = chunk.log_p_TV - chunk.log_ratio_TV
        q_TV = log_q_TV.exp()
        return -(q_TV * chunk.log_ratio_TV).sum(-1), chunk.log_p_TV.exp() - q_TV


def assert_same(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, **EXACT)
        assert w.abs().max() > 1e-3


def evaluated(case, loss, factor=1.0):
    total = case.stream(loss).total
    return total, *case.gradients(total, factor)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 1.3)])
@pytest.mark.parametrize("size", [1, 2, 50])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_gradients_equal_the_formula(name, size, temperatures):
    student, teacher = temperatures
    loss = PerTokenLoss(
        per_token=FUNCTIONS[name], student_temperature=student, teacher_temperature=teacher, chunk_tokens=size
    )
    case = Case((3, 9))
    expected = FUNCTIONS[name](*case.distributions(loss)).sum()
    wanted = expected.detach(), *(g.clone() for g in case.gradients(expected, 3.7))
    assert_same(evaluated(case, loss, 3.7), wanted)


class Decoder(nn.Module):
    """The least that has an LM head: states are a function of the embedding, which may be the head too."""

    def __init__(self, tied):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.tok_embeddings = nn.Embedding(V, D, dtype=torch.float64)
        self.mix = nn.Linear(D, D, dtype=torch.float64)
        self.output = TiedLinear(self.tok_embeddings) if tied else nn.Linear(D, V, bias=False, dtype=torch.float64)
        self.layers = range(TOP)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, tokens):
        return self.mix(self.tok_embeddings(tokens)).tanh()


@pytest.mark.parametrize("size", [1, 2, 50])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_the_embedding_gets_both_gradients(tied, size):
    case, model = Case((3, 9)), Decoder(tied)
    tokens = torch.randint(0, V, (3, 9), generator=torch.Generator().manual_seed(3))
    loss = PerTokenLoss(per_token=forward_kl, student_temperature=0.7, teacher_temperature=1.3, chunk_tokens=size)
    log_p = (model.output(model(tokens)).flatten(0, 1)[case.index_T] / 0.7).log_softmax(-1)
    expected = forward_kl(log_p, case.distributions(loss)[1]).sum()
    (3.7 * expected).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    heads = Heads(LMHead(model), case.heads.teacher, V)
    total = loss.stream(heads, case.teacher_TC, case.tokens)(TOP, model(tokens))
    (3.7 * total).backward()
    assert_same([total], [expected.detach()])
    assert_same([parameter.grad for parameter in model.parameters()], list(wanted.values()))
    assert len(wanted) == (3 if tied else 4)


@pytest.mark.parametrize("written_out", [ForwardKL, FullReverseKL])
@pytest.mark.parametrize("size", [1, 2, 50])
def test_a_function_is_as_good_as_a_class_with_its_gradient_worked_out(written_out, size):
    arguments = {"student_temperature": 0.7, "teacher_temperature": 1.3, "chunk_tokens": size}
    function = {ForwardKL: forward_kl, FullReverseKL: kl}[written_out]
    case = Case((3, 9), student_padding=3, teacher_padding=2)
    wanted = [tensor.clone() for tensor in evaluated(case, written_out(**arguments))]
    assert_same(evaluated(case, PerTokenLoss(per_token=function, **arguments)), wanted)


@pytest.mark.parametrize("name", ["forward", "reverse", "jensen-shannon", "squared"])
def test_the_student_at_the_teacher_has_no_loss_and_no_gradient(name):
    case = Case()
    case.heads = Heads(case.heads.student, Weight(case.student_VD.detach().clone()), V)
    case.teacher_TC = case.state_BSD.detach().flatten(0, 1)[case.index_T].clone()
    assert all(tensor.abs().max() < 1e-13 for tensor in evaluated(case, PerTokenLoss(per_token=FUNCTIONS[name])))


@pytest.mark.parametrize("name", ["forward", "reverse", "jensen-shannon", "squared"])
def test_the_gradient_changes_with_the_teacher(name):
    case, loss = Case(), PerTokenLoss(per_token=FUNCTIONS[name])
    _, state, head = evaluated(case, loss)
    case.teacher_TC = case.teacher_TC.flip(0) * 0.5
    _, other_state, other_head = evaluated(case, loss)
    assert (state - other_state).abs().max() > 1e-2
    assert (head - other_head).abs().max() > 1e-2


def test_no_token_at_all_still_has_a_graph_and_masked_ones_get_no_gradient():
    total, *gradients = evaluated(Case(marked=0.0), PerTokenLoss(per_token=forward_kl))
    assert total.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients)
    case = Case((3, 9))
    _, state_BSD, _ = evaluated(case, PerTokenLoss(per_token=forward_kl))
    used = torch.zeros(27, dtype=torch.bool).index_fill_(0, case.index_T, True)
    assert 0 < used.sum() < 27
    assert torch.equal(state_BSD.flatten(0, 1).abs().amax(-1) > 0, used)


@pytest.mark.parametrize("path", ["tests.losses.token_losses.forward_kl", forward_kl])
def test_a_config_gives_the_function_by_its_path(path):
    section = {"_component_": "oprd_tune.losses.PerTokenLoss", "per_token": path, "chunk_tokens": 3}
    loss, case = Component.find("loss", section)(), Case()
    assert (loss.chunk_tokens, loss.sampler_top_k) == (3, 0)
    wanted = [tensor.clone() for tensor in evaluated(case, ForwardKL())]
    assert_same(evaluated(case, loss), wanted)


# ---- memory ----


def test_nothing_of_tokens_times_vocabulary_is_ever_made_and_few_chunks_live_at_once():
    case, loss = Case((4, 16), marked=1.0), PerTokenLoss(per_token=forward_kl, chunk_tokens=4)
    largest, at_once = live_tensors(lambda: evaluated(case, loss), 4 * V)
    assert largest == 64 * D < 64 * V
    assert 3 < at_once <= 7
    assert loss.working_bytes(V, D) == 8 * 4 * V * 4  # three of any dense loss, p, and four of the function


def test_the_function_runs_once_for_each_chunk_and_its_graph_is_gone_before_the_next():
    case, kept, calls = Case((4, 16), marked=1.0), [], []

    def function(log_p, log_q):
        assert not [reference for reference in kept if reference() is not None]
        assert log_p.requires_grad
        assert log_p.is_leaf
        assert not log_q.requires_grad
        calls.append(len(log_p))
        away = log_q - log_p
        loss_T = (log_q.exp() * away).sum(-1)
        kept.extend(map(weakref.ref, (log_p, log_q, away, loss_T)))
        return loss_T

    total = case.stream(PerTokenLoss(per_token=function, chunk_tokens=10)).total
    assert not [reference for reference in kept if reference() is not None]
    assert len(kept) == 4 * 7
    total.backward()
    assert calls == [10] * 6 + [4]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda log_p, log_q: log_p - log_q, rf"returned \(4, {V}\); it must return one value a token: \(4,\)"),
        (lambda log_p, log_q: kl(log_p, log_q)[:, None], r"returned \(4, 1\); it must return one value a token"),
        (lambda log_p, log_q: kl(log_p, log_q).mean(), r"returned \(\); it must return one value a token: \(4,\)"),
        (lambda log_p, log_q: kl(log_p, log_q).mean().item(), "returned float; it must return one value a token"),
        (lambda log_p, log_q: None, "returned NoneType; it must return one value a token"),
        (lambda log_p, log_q: log_q.exp().square().sum(-1), "returned something that does not depend on the student"),
        (lambda log_p, log_q: kl(log_p.detach(), log_q), "returned something that does not depend on the student"),
    ],
)
def test_functions_that_return_something_else_are_explained(function, message):
    with pytest.raises(ConfigError, match=f"^loss.per_token {message}"):
        Case(marked=1.0).stream(PerTokenLoss(per_token=function, chunk_tokens=4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_token": 3}, "loss.per_token is 3; it must be a component that gives a Callable or a text"),
        ({"per_token": "tests.losses.token_losses.V"}, "loss.per_token 9 is no function"),
        ({"per_token": "nowhere.at_all"}, "loss.per_token 'nowhere.at_all' cannot be found: "),
        (
            {"per_token": "tests.losses.token_losses.forward"},
            "loss.per_token '.*forward' cannot be found in tests.losses.token_losses; did you mean .*forward_kl",
        ),
        ({}, "loss: oprd_tune.losses.PerTokenLoss cannot be constructed: .*'per_token'"),
        (
            {"per_token": forward_kl, "student_temperature": 0},
            "loss.student_temperature is 0; it must be a finite number above 0",
        ),
        ({"per_token": forward_kl, "chunk_tokens": 0}, "loss.chunk_tokens is 0; it must be a whole number"),
    ],
)
def test_mistakes_in_a_config_are_explained(arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        Component.find("loss", {"_component_": "oprd_tune.losses.PerTokenLoss", **arguments})()
