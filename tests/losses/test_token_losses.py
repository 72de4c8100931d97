"""Output-space losses: values and gradients against their formulas, the exact identities, and what stays in memory."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from oprd_tune.errors import ConfigError
from oprd_tune.losses import (
    ControlVariateReverseKL,
    DetachedTopKReverseKL,
    ForwardKL,
    FullReverseKL,
    GeneralisedJSD,
    MixedKL,
    PerTokenLoss,
    SampledReverseKL,
    TailedTopKKL,
    TopKReverseKL,
)
from oprd_tune.losses.diagnostics import diagnose, evenly_spaced
from oprd_tune.losses.divergences import EntryDivergence
from oprd_tune.losses.token_loss import Comparison
from oprd_tune.metrics.step import Metrics
from oprd_tune.modeling.heads import Heads
from oprd_tune.ranks import Ranks
from oprd_tune.selection import ResponseTokens
from tests.losses.token_losses import LOSSES, Case, D, K, V, Weight, kl, live_tensors, on, plain_topk

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def formula(case, loss, plain, tokens=None):
    return plain(loss, *case.distributions(loss), tokens or case.tokens)


@pytest.mark.parametrize("lengths", [(1, 1), (2, 7), (3, 50)])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_equal_the_formula(name, lengths):
    make, plain = LOSSES[name]
    case, loss = Case(lengths, marked=1.0), make(student_temperature=0.7, teacher_temperature=1.3, chunk_tokens=4)
    expected = formula(case, loss, plain)
    wanted = case.gradients(expected, 3.7)
    stream = case.stream(loss)
    got = case.gradients(stream.total, 3.7)
    torch.testing.assert_close(stream.total, expected.detach(), **EXACT)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, **EXACT)
        assert w.abs().max() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_heads_padded_to_other_sizes_are_compared_on_the_tokens_that_both_have(name):
    make, plain = LOSSES[name]
    case = Case(student_padding=3, teacher_padding=2)
    wanted = case.gradients(formula(case, make(), plain))
    got = case.gradients(case.stream(make()).total)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, **EXACT)
    assert got[1][V:].abs().max() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_neither_chunks_nor_microbatches_change_the_sum(name):
    make, _ = LOSSES[name]
    case = Case((4, 11))
    totals, gradients = [], []
    for size in (1, 5, 512):
        totals.append(case.stream(make(chunk_tokens=size)).total)
        gradients.append(case.gradients(totals[-1]))
    whole = gradients[2]
    for i in (0, 1):
        torch.testing.assert_close(totals[i], totals[2], **EXACT)
        for g, w in zip(gradients[i], whole, strict=True):
            torch.testing.assert_close(g, w, **EXACT)
    half = len(case.tokens) // 2
    parts = 0.0
    for start, size in ((0, half), (half, len(case.tokens) - half)):
        stream = make().stream(case.heads, case.teacher_TC[start : start + size], case.tokens.chunk(start, size))
        parts = parts + stream(*stream.layers, case.state_BSD)
    for g, w in zip(case.gradients(parts), whole, strict=True):
        torch.testing.assert_close(g, w, **EXACT)


@pytest.mark.parametrize("name", LOSSES)
def test_each_token_counts_as_often_as_its_weight_says(name):
    """Against the sum of the tokens' own losses, each read alone."""
    make, _ = LOSSES[name]
    case, loss = Case((4, 11)), make(student_temperature=0.7, chunk_tokens=5)
    weight_T = torch.rand(len(case.tokens), dtype=torch.float64)
    wanted = 0.0
    for i, weight in enumerate(weight_T):
        stream = loss.stream(case.heads, case.teacher_TC[i : i + 1], case.tokens.chunk(i, 1))
        wanted = wanted + weight * stream(*stream.layers, case.state_BSD)
    expected = case.gradients(wanted)
    expected = [gradient.clone() for gradient in expected]
    got = case.stream(loss, replace(case.tokens, weight_T=weight_T)).total
    torch.testing.assert_close(got, wanted, **EXACT)
    for g, w in zip(case.gradients(got), expected, strict=True):
        torch.testing.assert_close(g, w, **EXACT)


@pytest.mark.parametrize("name", LOSSES)
def test_the_student_at_the_teacher_has_no_gradient(name):
    make, _ = LOSSES[name]
    case = Case()
    case.heads = Heads(case.heads.student, Weight(case.student_VD.detach().clone()), V)
    case.teacher_TC = case.state_BSD.detach().flatten(0, 1)[case.index_T].clone()
    stream = case.stream(make())
    assert stream.total.abs() < 1e-13
    assert all(g.abs().max() < 1e-13 for g in case.gradients(stream.total))


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_changes_with_the_teacher(name):
    make, _ = LOSSES[name]
    case = Case()
    one = case.gradients(case.stream(make()).total)[0].clone()
    case.teacher_TC = case.teacher_TC.flip(0) * 0.5
    other = case.gradients(case.stream(make()).total)[0]
    assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("name", LOSSES)
def test_no_token_at_all_still_has_a_graph(name):
    make, _ = LOSSES[name]
    case = Case(marked=0.0)
    stream = case.stream(make())
    assert stream.total.item() == 0
    assert all(g.abs().max() == 0 for g in case.gradients(stream.total))


@pytest.mark.parametrize("name", LOSSES)
def test_bf16_agrees_with_fp64_to_bf16_precision(name):
    """Logits and sums are fp32, so values agree to 1e-3; gradients are rounded to bf16 twice (8 bits of mantissa)."""
    make, _ = LOSSES[name]
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        case = Case((4, 11), dtype=dtype)
        total = case.stream(make()).total
        results.append((total.double(), *(g.double() for g in case.gradients(total))))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-3)
    for low, high in zip(results[0][1:], results[1][1:], strict=True):
        assert (low - high).norm() / high.norm() < 2**-6


def offset_case(offset, dtype):
    """A case where every logit is a multiple of 2⁻¹² plus a common `offset`, which fp32 holds exactly."""
    case = Case((4, 11), dtype=dtype, marked=1.0)
    weights = (case.student_VD, case.heads.teacher.weight_VD)
    with torch.no_grad():
        for tensor in (case.state_BSD, case.teacher_TC, *weights):
            tensor.mul_(64).round_().clamp_(-255, 255).div_(64)
        for state in (case.state_BSD, case.teacher_TC):
            state[..., 0] = 128
        for weight in weights:
            weight[:, 0] = offset / 128
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_an_offset_that_all_logits_share_costs_no_precision(name, dtype):
    make, _ = LOSSES[name]
    errors = []
    for offset in (0, 1024):
        results = []
        for precision in (dtype, torch.float64):
            case = offset_case(offset, precision)
            stream = case.stream(make(teacher_temperature=2.0))
            state, weight = (g.double() for g in case.gradients(stream.total))
            results.append((stream.total.double(), state[..., 1:], weight[:, 1:]))  # the offset's own cancel
        errors.append([((low - high).norm() / high.norm()).item() for low, high in zip(*results, strict=True)])
    for alone, shared in zip(*errors, strict=True):
        assert shared <= 2 * alone + 2e-6


@pytest.mark.parametrize("name", ["full", "sampled", "top-k student", "top-k detached", "a function"])
def test_in_bf16_many_small_chunks_lose_nothing(name):
    """The head's gradient is summed in fp32: 400 chunks are as good as one."""
    make, _ = LOSSES[name]
    errors = []
    exact = Case((8, 500), marked=1.0)
    wanted = exact.gradients(exact.stream(make()).total)[1]
    for size in (4000, 10):
        case = Case((8, 500), dtype=torch.bfloat16, marked=1.0)
        got = case.gradients(case.stream(make(chunk_tokens=size)).total)[1]
        errors.append((got.double() - wanted).norm() / wanted.norm())
    assert errors[1] < 2 * errors[0] + 1e-3 < 0.02


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("name", ["full", "top-k student", "a function"])
def test_states_and_heads_may_differ_in_dtype(name, dtypes):
    make, _ = LOSSES[name]
    case, exact = Case(), Case()
    case.state_BSD = case.state_BSD.detach().to(dtypes[0]).requires_grad_()
    case.student_VD = case.student_VD.detach().to(dtypes[1]).requires_grad_()
    case.heads = Heads(Weight(case.student_VD), Weight(case.heads.teacher.weight_VD.to(dtypes[1])), V)
    wanted = exact.gradients(exact.stream(make()).total)
    for got, w in zip(case.gradients(case.stream(make()).total), wanted, strict=True):
        assert (got.double() - w).norm() / w.norm() < 2**-6


# ---- identities, with every possible next token enumerated ----

ENUMERATED = {
    "sampled": SampledReverseKL(),
    "vopd": ControlVariateReverseKL(),
    **{f"vopd top-{k}": ControlVariateReverseKL(baseline_k=k) for k in range(2, V + 1)},
}


def of_each_token(case, loss):
    """p [T, V], and the gradients of the state, [V, …], if every response token had been v."""
    gradients = []
    for v in range(V):
        tokens = ResponseTokens(case.index_T, torch.full_like(case.index_T, v), case.tokens.sampler_logprobs_T)
        gradients.append(case.gradients(case.stream(loss, tokens).total))
    return case.distributions()[0].exp().detach(), gradients


@pytest.mark.parametrize("name", ENUMERATED)
def test_sampled_estimates_are_unbiased(name):
    case = Case((1, 1), marked=1.0)
    p_1V, gradients = of_each_token(case, ENUMERATED[name])
    wanted = case.gradients(kl(*case.distributions()).sum())
    for which in (0, 1):
        mean = sum(p * g[which] for p, g in zip(p_1V[0], gradients, strict=True))
        torch.testing.assert_close(mean, wanted[which], **EXACT)


def test_the_advantage_of_vopd_has_zero_mean_and_a_smaller_square():
    log_p, log_q = Case((3, 50)).distributions()
    reward = log_q - log_p
    advantage = reward + kl(log_p, log_q)[:, None]
    p = log_p.exp()
    torch.testing.assert_close((p * advantage).sum(-1), torch.zeros_like(p[:, 0]), **EXACT)
    assert ((p * advantage.square()).sum(-1) <= (p * reward.square()).sum(-1)).all()


def test_vopd_lowers_the_variance_of_the_gradient_on_this_fixture():
    case = Case((1, 1), marked=1.0)
    variance = {}
    for name in ("sampled", "vopd"):
        p_1V, gradients = of_each_token(case, ENUMERATED[name])
        stacked = torch.stack([g[0].flatten() for g in gradients])
        mean = (p_1V[0][:, None] * stacked).sum(0)
        variance[name] = (p_1V[0][:, None] * (stacked - mean).square()).sum()
    assert variance["vopd"] < 0.8 * variance["sampled"]


@pytest.mark.parametrize("support", ["student", "teacher", "union"])
def test_top_k_of_the_whole_vocabulary_is_full_kl(support):
    case = Case()
    full, top = FullReverseKL(), TopKReverseKL(k=V, support=support)
    wanted = case.gradients(case.stream(full).total)
    got = case.gradients(case.stream(top).total)
    torch.testing.assert_close(case.stream(top).total, case.stream(full).total, **EXACT)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, **EXACT)


def test_the_detached_form_differs_from_eq_5_by_the_leak_of_mass():
    case = Case()
    log_p, log_q = case.distributions()
    ids = log_p.topk(K).indices
    log_mass_p, log_mass_q = (x.gather(1, ids).logsumexp(-1) for x in (log_p, log_q))
    leak = kl(*on(ids, log_p, log_q)) + log_mass_p - log_mass_q
    wanted = case.gradients((kl(*on(ids, log_p, log_q)) + leak.detach() * log_mass_p).sum())
    got = case.gradients(case.stream(DetachedTopKReverseKL(k=K)).total)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, **EXACT)


def test_the_sampler_may_supply_the_support():
    case = Case()
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(len(case.tokens))])
    tokens = ResponseTokens(
        case.index_T, case.tokens.tokens_T, case.tokens.sampler_logprobs_T, ids, torch.rand(len(ids))
    )
    loss = TopKReverseKL(k=K, support="sampler")
    assert loss.sampler_top_k == K
    expected = formula(case, loss, plain_topk, tokens)
    wanted = case.gradients(expected)
    stream = case.stream(loss, tokens)
    torch.testing.assert_close(stream.total, expected.detach(), **EXACT)
    for g, w in zip(case.gradients(stream.total), wanted, strict=True):
        torch.testing.assert_close(g, w, **EXACT)


# ---- metrics ----


def test_measures_what_the_formulas_say():
    case = Case()
    log_p, log_q = (x.detach() for x in case.distributions())
    ids = log_p.topk(K).indices
    mass_p, mass_q = (x.gather(1, ids).exp().sum() for x in (log_p, log_q))
    for name in ("full", "sampled", "vopd", "top-k detached"):
        torch.testing.assert_close(case.stream(LOSSES[name][0]()).metrics._sums["token/kl"], kl(log_p, log_q).sum())
    top = case.stream(TopKReverseKL(k=K)).metrics._sums
    torch.testing.assert_close(top["token/student_mass"], mass_p)
    torch.testing.assert_close(top["token/support_kl"], kl(*on(ids, log_p, log_q)).sum())
    detached = case.stream(DetachedTopKReverseKL(k=K)).metrics._sums
    torch.testing.assert_close(detached["token/teacher_mass"], mass_q)
    teacher_ids = log_q.topk(K).indices
    teacher = case.stream(TopKReverseKL(k=K, support="teacher")).metrics._sums
    torch.testing.assert_close(teacher["token/teacher_mass"], log_q.gather(1, teacher_ids).exp().sum())
    both = torch.zeros_like(log_p, dtype=torch.bool).scatter_(1, ids, True).scatter_(1, teacher_ids, True)
    union = case.stream(TopKReverseKL(k=K, support="union")).metrics._sums
    torch.testing.assert_close(union["token/student_mass"], log_p.exp()[both].sum())
    torch.testing.assert_close(union["token/teacher_mass"], log_q.exp()[both].sum())
    sampled = case.stream(SampledReverseKL()).metrics._sums
    gap = log_p.gather(1, case.tokens.tokens_T[:, None]).squeeze(1) - case.tokens.sampler_logprobs_T
    torch.testing.assert_close(sampled["token/logprob_gap"], gap.abs().sum())


def test_diagnoses_exactly():
    case = Case((1, 1), marked=1.0)
    log_p, log_q = (x.detach() for x in case.distributions())
    p, q = log_p.exp(), log_q.exp()
    state = case.state_BSD.detach().flatten(0, 1)[case.index_T]
    metrics, kl_T = diagnose(state, case.teacher_TC, case.heads, k=K)
    sums = metrics._sums
    torch.testing.assert_close(kl_T, kl(log_p, log_q))
    ids, teacher_ids = log_p.topk(K).indices, log_q.topk(K).indices
    torch.testing.assert_close(sums["diagnostics/kl"], kl(log_p, log_q).sum())
    torch.testing.assert_close(sums["diagnostics/student_entropy"], -(p * log_p).sum())
    torch.testing.assert_close(sums["diagnostics/entropy_gap"], (p * log_p).sum() - (q * log_q).sum())
    torch.testing.assert_close(sums["diagnostics/teacher_mass"], q.gather(1, ids).sum())
    assert sums["diagnostics/top_k_overlap"] == len({*ids[0].tolist()} & {*teacher_ids[0].tolist()}) / K
    # Variance over the next token of the estimates' gradients with respect to the logits, by enumeration.
    score = torch.eye(V, dtype=torch.float64) - p
    ratio = (log_p - log_q)[0]
    for name, advantage in (("sampled", ratio), ("vopd", ratio - kl(log_p, log_q))):
        estimate = advantage[:, None] * score
        mean = (p[0][:, None] * estimate).sum(0)
        variance = (p[0] * (estimate - mean).square().sum(-1)).sum()
        torch.testing.assert_close(sums[f"diagnostics/variance_{name}"], variance)
        torch.testing.assert_close(sums["diagnostics/gradient_square"], mean.square().sum())


def test_a_subsample_is_spread_evenly():
    assert evenly_spaced(10, 4, torch.device("cpu")).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, 8, torch.device("cpu")).tolist() == [0, 1, 2]
    assert evenly_spaced(0, 8, torch.device("cpu")).tolist() == []


# ---- memory ----


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"a function"}))
def test_few_chunks_of_logits_live_and_nothing_of_tokens_times_vocabulary(name):
    make, _ = LOSSES[name]
    case, tokens, vocabulary, chunk = Case((4, 100), marked=1.0), 400, V, 50
    case.gradients(case.stream(make(chunk_tokens=chunk)).total)
    step = lambda: case.gradients(case.stream(make(chunk_tokens=chunk)).total)  # noqa: E731
    largest, at_once = live_tensors(step, chunk * vocabulary)
    assert largest <= max(case.state_BSD.numel(), tokens * 2 * K) < tokens * vocabulary
    if isinstance(make(), (EntryDivergence, TailedTopKKL)):
        counted = make(chunk_tokens=chunk).working_bytes(V, D)
        assert at_once < counted / (4 * chunk * V)  # which counts one more, for the copy in the head's dtype
    else:
        assert at_once == (1 if isinstance(make(), TopKReverseKL) else 2)


def test_the_head_s_gradient_goes_straight_into_its_buffer():
    case = Case()
    once = case.gradients(case.stream(TopKReverseKL(k=K)).total)[1].clone()
    buffer = case.student_VD.grad
    case.stream(TopKReverseKL(k=K)).total.backward()
    assert case.student_VD.grad is buffer
    torch.testing.assert_close(buffer, 2 * once)


@pytest.mark.parametrize("name", ["full", "top-k student", "a function"])
def test_a_frozen_head_gets_no_gradient(name):
    case = Case()
    wanted = case.gradients(case.stream(LOSSES[name][0]()).total)[0].clone()
    case.student_VD.requires_grad_(False)
    got, head = case.gradients(case.stream(LOSSES[name][0]()).total)
    assert head is None
    torch.testing.assert_close(got, wanted, **EXACT)


ROOT = Path(__file__).parents[2]
PAGES = ["CONTRIBUTING.md", "docs/opd_topk_distributed.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_loss_that_the_docs_show_how_to_write_is_right(page):
    blocks = [block.split("```")[0] for block in (ROOT / page).read_text().split("```python")[1:]]
    (code,) = [block for block in blocks if "def forward_kl" in block]
    namespace = {}
    exec(code, namespace)
    case = Case()
    log_p, log_q = case.distributions()
    expected = kl(log_q, log_p).sum()
    wanted = case.gradients(expected)
    stream = case.stream(PerTokenLoss(per_token=namespace["forward_kl"], chunk_tokens=3))
    torch.testing.assert_close(stream.total, expected.detach(), **EXACT)
    for g, w in zip(case.gradients(stream.total), wanted, strict=True):
        torch.testing.assert_close(g, w, **EXACT)


def test_every_loss_that_the_docs_show_is_tested():
    pages = [ROOT / "CONTRIBUTING.md", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert sorted(str(p.relative_to(ROOT)) for p in pages if "def forward_kl" in p.read_text()) == PAGES


# ---- mistakes ----

ON_POLICY = {"vocabulary": V, "engine": SimpleNamespace(temperature=1.0, samples_with_student=True)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKReverseKL(k=1), "k is 1; it must be a whole number, at least 2"),
        (lambda: TopKReverseKL(support="both"), "allowed are student, teacher, union, sampler"),
        (lambda: DetachedTopKReverseKL(k=0), "k is 0; it must be a whole number, at least 2"),
        (lambda: ControlVariateReverseKL(baseline_k=1), "baseline_k is 1"),
        (lambda: SampledReverseKL(reward_clip=0), "reward_clip is 0; it must be a finite number above 0"),
        (lambda: FullReverseKL(teacher_temperature=0), "teacher_temperature is 0; it must be a finite number above 0"),
        (lambda: FullReverseKL(chunk_tokens=0), "chunk_tokens is 0"),
        (lambda: FullReverseKL(chunk_tokens=1.5), "chunk_tokens is 1.5; it must be a whole number"),
        (lambda: TopKReverseKL(k=2.5), "k is 2.5; it must be a whole number"),
        (lambda: TopKReverseKL(k=V + 1).check(**ON_POLICY), f"k is {V + 1}, but student and teacher share {V} tokens"),
        (lambda: DetachedTopKReverseKL(k=V + 1).check(**ON_POLICY), "share 9 tokens"),
        (lambda: ControlVariateReverseKL(baseline_k=V + 1).check(**ON_POLICY), "baseline_k is 10"),
        (lambda: SampledReverseKL(student_temperature=2.0).check(**ON_POLICY), "unbiased only where they are equal"),
        (lambda: SampledReverseKL(importance_ratio_cap=2.0).check(**ON_POLICY), "set it to null"),
        (
            lambda: SampledReverseKL(importance_ratio_cap=2.0, student_temperature=0.7).check(
                V, SimpleNamespace(temperature=0.7, samples_with_student=False)
            ),
            "needs rollout.temperature 1",
        ),
    ],
)
def test_mistakes_are_explained(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ---- divergences ----


def random_logs(tokens=6, vocabulary=9, spread=3.0):
    return ((torch.randn(tokens, vocabulary, dtype=torch.float64) * spread).log_softmax(-1) for _ in range(2))


def test_jensen_shannon_is_the_entropy_of_the_mixture_beyond_that_of_its_parts():
    """By enumeration of both outcomes: JSD(β) = I(which model; token) with the models drawn at β and 1 − β."""
    log_p, log_q = random_logs()
    for beta in (0.1, 0.5, 0.8):
        chunk = Comparison(log_p.clone(), log_p - log_q, None)
        loss_T, _ = GeneralisedJSD(beta=beta).objective(chunk, Metrics())
        joint = torch.stack([beta * log_q.exp(), (1 - beta) * log_p.exp()])
        apart = joint.sum(0, keepdim=True) * joint.sum(2, keepdim=True)
        torch.testing.assert_close(loss_T.sum(), (joint * (joint / apart).log()).sum(), **EXACT)


def test_a_divergence_is_limited_entry_by_entry():
    """A pivot token: the teacher is sure of what the student would hardly say."""
    logits = torch.zeros(1, 50, dtype=torch.float64)
    log_p, log_q = (logits.index_fill(1, torch.tensor([3]), x).log_softmax(-1) for x in (-9.0, 9.0))
    gradients = {}
    for clip in (None, 1.0):
        metrics = Metrics()
        chunk = Comparison(log_p.clone(), log_p - log_q, None)
        total, gradients[clip] = ForwardKL(entry_clip=clip).objective(chunk, metrics)
        found = metrics.reduce(Ranks())
        assert found.get("token/clipped_share") == (None if clip is None else 1.0)
        assert (total <= 1.0) == (clip is not None)
    assert gradients[None].norm() > 100 * gradients[1.0].norm()


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("name", ["forward", "mixed", "jsd", "tailed", "tailed forward"])
def test_certain_models_that_disagree_give_numbers(name, dtype):
    """Log-probabilities down to −200, which probabilities in fp32 cannot hold."""
    logits = torch.full((2, 9), -200.0, dtype=dtype)
    log_p = logits.index_fill(1, torch.tensor([1]), 0.0).log_softmax(-1)
    log_q = logits.index_fill(1, torch.tensor([2]), 0.0).log_softmax(-1)
    loss = LOSSES[name][0]()
    total, gradient = loss.objective(Comparison(log_p.clone(), log_p - log_q, None), Metrics())
    assert total.isfinite().all()
    assert (total > 0.1).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("tail", [0.5, 1e-3])
def test_a_tail_keeps_mass_where_renormalising_lets_it_leak(tail):
    """Both models agree on the ratios within 𝒮, and the student has lost mass to the tail."""
    inside = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rows = [torch.cat([inside * (1 - mass), torch.full((6,), mass / 6, dtype=torch.float64)]) for mass in (tail, 1e-6)]
    log_p, log_q = (row.log()[None] for row in rows)
    total, gradient = TailedTopKKL(k=3).objective(Comparison(log_p.clone(), log_p - log_q, None), Metrics())
    ids = torch.tensor([[0, 1, 2]])
    assert kl(*on(ids, log_p, log_q)).item() == pytest.approx(0, abs=1e-12)
    wanted = tail * math.log(tail / 1e-6) + (1 - tail) * math.log((1 - tail) / (1 - 1e-6))
    assert total.item() == pytest.approx(wanted, rel=1e-9)
    assert (gradient[0, :3] < 0).all()  # a step along −gradient brings mass back
    assert (gradient[0, 3:] > 0).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ForwardKL(entry_clip=0), "loss.entry_clip is 0; it must be a finite number above 0"),
        (lambda: MixedKL(forward_weight=1.5), "loss.forward_weight is 1.5; it must lie within 0 and 1"),
        (lambda: GeneralisedJSD(beta=-0.1), "loss.beta is -0.1; it must lie within 0 and 1"),
        (lambda: TailedTopKKL(k=0), "loss.k is 0; it must be a whole number, at least 1"),
        (lambda: TailedTopKKL(support="union"), "loss.support is 'union'; allowed are student, teacher"),
        (lambda: TailedTopKKL(direction="both"), "loss.direction is 'both'; allowed are reverse, forward"),
        (lambda: SampledReverseKL(reward_max=-1), "loss.reward_max is -1; it must be a finite number above 0"),
    ],
)
def test_arguments_of_divergences_are_checked(make, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        make()
