"""Fixtures for the output-space losses: two heads on random states, and every loss beside its formula written out."""

import math
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    TopKMixedKL,
    TopKReverseKL,
)
from oprd_tune.modeling.heads import Heads
from oprd_tune.selection import ResponseTokens

V, D, C, K = 9, 5, 7, 3
TOP = 4


class Weight:
    """Stands where an LMHead does."""

    layer = TOP

    def __init__(self, weight_VD):
        self.weight_VD = weight_VD


class Case:
    """States, heads and tokens; `student_padding` rows more than the vocabulary on the student's head."""

    def __init__(self, lengths=(2, 7), *, student_padding=0, teacher_padding=0, dtype=torch.float64, marked=0.7):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).bfloat16().to(dtype)

        self.state_BSD = randn(*lengths, D).requires_grad_()
        self.student_VD = randn(V + student_padding, D).requires_grad_()
        self.heads = Heads(Weight(self.student_VD), Weight(randn(V + teacher_padding, C)), V)
        mask = torch.rand(lengths, generator=generator) < marked
        self.index_T = mask.flatten().nonzero(as_tuple=True)[0]
        count = len(self.index_T)
        self.teacher_TC = randn(count, C)
        self.tokens = ResponseTokens(
            self.index_T,
            torch.randint(0, V, (count,), generator=generator),
            torch.rand(count, generator=generator, dtype=torch.float64).log(),
        )

    def stream(self, loss, tokens=None):
        stream = loss.stream(self.heads, self.teacher_TC, tokens or self.tokens)
        stream(TOP, self.state_BSD)
        return stream

    def gradients(self, total, factor=1.0):
        """With `backward`, as the loss writes the head's gradient in place."""
        self.state_BSD.grad = self.student_VD.grad = None
        (factor * total).backward()
        return self.state_BSD.grad, self.student_VD.grad

    def distributions(self, loss=None):
        """log p and log q, [T, V], with a graph to the student."""
        temperatures = (loss.student_temperature, loss.teacher_temperature) if loss else (1.0, 1.0)
        student = self.state_BSD.flatten(0, 1)[self.index_T] @ self.student_VD[:V].T / temperatures[0]
        teacher = self.teacher_TC @ self.heads.teacher.weight_VD[:V].T / temperatures[1]
        return student.log_softmax(-1), teacher.log_softmax(-1)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def on(ids, log_p, log_q):
    """Both, renormalised on a support."""
    return log_p.gather(1, ids).log_softmax(-1), log_q.gather(1, ids).log_softmax(-1)


def plain_full(loss, log_p, log_q, tokens):
    return clipped_sum(loss, entries(log_p, log_q))


def forward_kl(log_p, log_q):
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def plain_forward(loss, log_p, log_q, tokens):
    return kl(log_q, log_p).sum()


def entries(log_p, log_q):
    """The terms of KL(p‖q), [T, V]."""
    return log_p.exp() * (log_p - log_q)


def clipped_sum(loss, entry):
    return (entry if loss.entry_clip is None else entry.clamp(max=loss.entry_clip)).sum()


def plain_forward_entries(loss, log_p, log_q, tokens):
    return clipped_sum(loss, entries(log_q, log_p))


def plain_mixed(loss, log_p, log_q, tokens):
    weight = loss.forward_weight
    return clipped_sum(loss, weight * entries(log_q, log_p) + (1 - weight) * entries(log_p, log_q))


def plain_jsd(loss, log_p, log_q, tokens):
    """As TRL defines it, its two ends included."""
    beta = loss.beta
    if beta in (0, 1):
        return clipped_sum(loss, entries(log_q, log_p) if beta == 0 else entries(log_p, log_q))
    mixture = torch.stack([log_p + math.log(1 - beta), log_q + math.log(beta)]).logsumexp(0)
    return clipped_sum(loss, beta * entries(log_q, mixture) + (1 - beta) * entries(log_p, mixture))


def plain_tailed(loss, log_p, log_q, tokens):
    ids = (log_p if loss.support == "student" else log_q).topk(loss.k).indices
    outcomes = []
    for log in (log_p, log_q):
        tail = log.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        outcomes.append(torch.cat([log.gather(1, ids), tail], dim=1))
    return kl(*(outcomes if loss.direction == "reverse" else outcomes[::-1])).sum()


def plain_sampled(loss, log_p, log_q, tokens):
    chosen, reference = (x.gather(1, tokens.tokens_T[:, None]).squeeze(1) for x in (log_p, log_q))
    reward = (reference - chosen).detach()
    if loss.reward_clip is not None:
        reward = reward.clamp(-loss.reward_clip, loss.reward_clip)
    if loss.reward_max is not None:
        reward = reward.clamp(max=loss.reward_max)
    if loss.importance_ratio_cap is not None:
        ratio = (chosen.detach() - tokens.sampler_logprobs_T).exp().clamp(max=loss.importance_ratio_cap)
    else:
        ratio = 1.0
    if isinstance(loss, ControlVariateReverseKL):
        if loss.baseline_k is None:
            reward = reward + kl(log_p, log_q).detach()
        else:
            ids = log_p.topk(loss.baseline_k).indices
            reward = reward + kl(*on(ids, log_p, log_q)).detach()
    return -(ratio * reward * chosen).sum()


def plain_topk(loss, log_p, log_q, tokens):
    """Also NeMo-RL's default: both KLs, weighted, on the teacher's top-k."""
    student, teacher = (x.topk(loss.k).indices.tolist() for x in (log_p, log_q))
    rows = {
        "student_support": student,
        "teacher_support": teacher,
        "union_support": [sorted({*a, *b}) for a, b in zip(student, teacher, strict=True)],
        "sampler_support": tokens.sampler_top_ids_TK.tolist() if tokens.sampler_top_ids_TK is not None else None,
    }[loss._choose.__name__]
    total = 0.0
    for t, row in enumerate(rows):
        ids = torch.tensor([row])
        p, q = on(ids, log_p[t : t + 1], log_q[t : t + 1])
        weight = getattr(loss, "forward_weight", 0)
        total = total + (weight * kl(q, p) + (1 - weight) * kl(p, q)).sum()
    return total


def plain_detached(loss, log_p, log_q, tokens):
    ids = log_p.topk(loss.k).indices
    log_p_on, log_q_on = log_p.gather(1, ids), log_q.gather(1, ids)
    weight = (log_p_on.softmax(-1) * (log_q_on - log_p_on)).detach()
    return -(weight * log_p_on).sum()


def live_tensors(function, size):
    """The largest tensor that any operation within `function` made, and how many of `size` elements lived at once."""
    largest, at_once, references = 0, 0, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal largest, at_once, references
            result = operation(*args, **(kwargs or {}))
            made = [r for r in tree_leaves(result) if isinstance(r, torch.Tensor) and not r._is_view()]
            largest = max([largest, *(r.numel() for r in made)])
            references += map(weakref.ref, made)
            del made
            references = [r for r in references if r() is not None]
            storages = {r().untyped_storage().data_ptr() for r in references if r().numel() == size}
            at_once = max(at_once, len(storages))
            return result

    with Watch():
        function()
    return largest, at_once


# Name -> how to make the loss from further arguments, its formula.
LOSSES = {
    "full": (FullReverseKL, plain_full),
    "full clipped": (lambda **k: FullReverseKL(entry_clip=0.05, **k), plain_full),
    "sampled": (SampledReverseKL, plain_sampled),
    "sampled clipped": (lambda **k: SampledReverseKL(reward_clip=0.5, **k), plain_sampled),
    "sampled weighted": (lambda **k: SampledReverseKL(importance_ratio_cap=2.0, **k), plain_sampled),
    "vopd": (ControlVariateReverseKL, plain_sampled),
    "vopd top-k": (lambda **k: ControlVariateReverseKL(baseline_k=K, **k), plain_sampled),
    "vopd weighted": (lambda **k: ControlVariateReverseKL(importance_ratio_cap=2.0, **k), plain_sampled),
    "top-k student": (lambda **k: TopKReverseKL(k=K, **k), plain_topk),
    "top-k teacher": (lambda **k: TopKReverseKL(k=K, support="teacher", **k), plain_topk),
    "top-k union": (lambda **k: TopKReverseKL(k=K, support="union", **k), plain_topk),
    "top-k mixed": (lambda **k: TopKMixedKL(k=K, support="teacher", forward_weight=0.3, **k), plain_topk),
    "top-k mixed union": (lambda **k: TopKMixedKL(k=K, support="union", forward_weight=0.7, **k), plain_topk),
    "top-k forward": (lambda **k: TopKMixedKL(k=K, forward_weight=1.0, **k), plain_topk),
    "top-k detached": (lambda **k: DetachedTopKReverseKL(k=K, **k), plain_detached),
    "sampled limited": (lambda **k: SampledReverseKL(reward_max=0.3, **k), plain_sampled),
    "forward": (ForwardKL, plain_forward_entries),
    "forward clipped": (lambda **k: ForwardKL(entry_clip=0.05, **k), plain_forward_entries),
    "mixed": (lambda **k: MixedKL(forward_weight=0.3, **k), plain_mixed),
    "mixed clipped": (lambda **k: MixedKL(forward_weight=0.3, entry_clip=0.02, **k), plain_mixed),
    "jsd": (lambda **k: GeneralisedJSD(beta=0.2, **k), plain_jsd),
    "jsd clipped": (lambda **k: GeneralisedJSD(beta=0.2, entry_clip=0.004, **k), plain_jsd),
    "jsd at 0": (lambda **k: GeneralisedJSD(beta=0, **k), plain_jsd),
    "jsd at 1": (lambda **k: GeneralisedJSD(beta=1.0, **k), plain_jsd),
    "tailed": (lambda **k: TailedTopKKL(k=K, **k), plain_tailed),
    "tailed teacher": (lambda **k: TailedTopKKL(k=K, support="teacher", **k), plain_tailed),
    "tailed forward": (lambda **k: TailedTopKKL(k=K, direction="forward", **k), plain_tailed),
    "a function": (lambda **k: PerTokenLoss(per_token=forward_kl, **k), plain_forward),
}
