"""What trains beside distillation: cross-entropy on reference answers, and a task's reward."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from oprd_tune.errors import ConfigError
from oprd_tune.losses import (
    Composite,
    FullReverseKL,
    HiddenStateMSE,
    ReferenceCrossEntropy,
    SampledReverseKL,
    TaskReward,
    TopKReverseKL,
)
from oprd_tune.losses.token_loss import Comparison
from oprd_tune.metrics.step import Metrics
from oprd_tune.rollout import NativeEngine
from tests.losses.token_losses import Case

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def graded(**kwargs):
    return TaskReward(grader="oprd_tune.grading.exact_match", **kwargs)


def some(case):
    return torch.rand(len(case.tokens), generator=torch.Generator().manual_seed(3)) < 0.5


def test_cross_entropy_is_that_of_given_tokens_alone():
    case, loss = Case((3, 11)), ReferenceCrossEntropy(student_temperature=0.7, chunk_tokens=4)
    given_T = some(case)
    log_p_TV, _ = case.distributions(loss)
    expected = F.nll_loss(log_p_TV[given_T], case.tokens.tokens_T[given_T], reduction="sum")
    wanted = [gradient.clone() for gradient in case.gradients(expected)]
    tokens = replace(case.tokens, given_T=given_T)
    stream = case.stream(loss, tokens)
    torch.testing.assert_close(stream.total, expected.detach(), **EXACT)
    for g, w in zip(case.gradients(stream.total), wanted, strict=True):
        torch.testing.assert_close(g, w, **EXACT)
    assert loss.count(tokens) == int(given_T.sum())
    assert loss.count(case.tokens) == 0
    assert case.stream(loss).total.item() == 0


def test_sampled_losses_leave_given_tokens_out():
    case = Case((3, 11))
    given_T = some(case)
    tokens = replace(case.tokens, given_T=given_T, advantage_T=torch.randn(len(case.tokens)).double())
    for loss in (SampledReverseKL(), graded()):
        part = loss.stream(case.heads, case.teacher_TC[~given_T], tokens.only(~given_T))
        alone = part(*part.layers, case.state_BSD)
        torch.testing.assert_close(case.stream(loss, tokens).total, alone, **EXACT)
        assert loss.count(tokens) == int((~given_T).sum())


@pytest.mark.parametrize("cap", [None, 1.5])
def test_the_reward_is_a_score_function_of_each_token(cap):
    case, loss = Case((3, 11)), graded(chunk_tokens=4, importance_ratio_cap=cap)
    advantage_T = torch.randn(len(case.tokens), dtype=torch.float64)
    log_p_TV, _ = case.distributions(loss)
    log_p_T = log_p_TV.gather(1, case.tokens.tokens_T[:, None]).squeeze(1)
    weight_T = 1 if cap is None else (log_p_T.detach() - case.tokens.sampler_logprobs_T).exp().clamp(max=cap)
    expected = -(weight_T * advantage_T * log_p_T).sum()
    wanted = [gradient.clone() for gradient in case.gradients(expected)]
    total = case.stream(loss, replace(case.tokens, advantage_T=advantage_T)).total
    torch.testing.assert_close(total, expected.detach(), **EXACT)
    for g, w in zip(case.gradients(total), wanted, strict=True):
        torch.testing.assert_close(g, w, **EXACT)


def test_in_expectation_it_climbs_the_reward():
    """All pairs of one-token responses, by enumeration: with the mean of both as baseline half of ∇E[r] is left."""
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    (climb,) = torch.autograd.grad((logits.softmax(-1) * reward).sum(), logits)
    loss, found = graded(normalise=False), torch.zeros(5, dtype=torch.float64)
    p, log_p_V = logits.softmax(-1).detach(), logits.log_softmax(-1).detach()
    for pair in product(range(5), repeat=2):
        chosen = torch.tensor(pair)
        tokens = replace(Case().tokens.chunk(0, 2), tokens_T=chosen)
        tokens = replace(tokens, advantage_T=loss.advantages(reward[chosen], torch.zeros(2)))
        chunk = Comparison(log_p_V.repeat(2, 1), torch.empty(2, 0), tokens)
        _, gradient_TV = loss.objective(chunk, Metrics())
        found += p[chosen].prod() * gradient_TV.mean(0)
    torch.testing.assert_close(found, -climb / 2, **EXACT)


def test_advantages_compare_the_responses_to_one_prompt():
    reward, group = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0]), torch.tensor([5, 5, 5, 2, 2, 7])
    spread = torch.tensor([1.0, 0.0, 1.0]).std() + 1e-4
    wanted = torch.tensor([1 / 3, -2 / 3, 1 / 3]) / spread
    torch.testing.assert_close(graded().advantages(reward, group), torch.cat([wanted, torch.zeros(3)]))
    plain = graded(normalise=False).advantages(reward, group)
    torch.testing.assert_close(plain, torch.tensor([1 / 3, -2 / 3, 1 / 3, 0, 0, 0]))


def test_what_reads_nothing_is_told():
    engine = NativeEngine()
    anchored = Composite({"opd": SampledReverseKL(), "sft": ReferenceCrossEntropy()})
    anchored.check(9, engine, references=True)
    with pytest.raises(ConfigError, match="set reference_share"):
        anchored.check(9, engine)
    with pytest.raises(ConfigError, match="SampledReverseKL needs what the sampler says"):
        Composite({"opd": SampledReverseKL()}).check(9, engine, references=True)
    top = TopKReverseKL(k=2, support="sampler")
    for parts in ({"top": top}, {"sampled": SampledReverseKL(), "top": top}):
        with pytest.raises(ConfigError, match="TopKReverseKL needs what the sampler says"):
            Composite({**parts, "opd": FullReverseKL()}).check(9, engine, references=True)
    Composite({"oprd": HiddenStateMSE(), "opd": SampledReverseKL()}).check(9, engine, references=True)
