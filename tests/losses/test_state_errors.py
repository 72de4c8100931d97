"""Gradients in closed form against autograd on the same error, in fp64."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oprd_tune.losses import HiddenStateLoss, HiddenStateMSE
from oprd_tune.losses.state_errors import (
    CLOSED_FORMS,
    StatePair,
    compared,
    gradient_of,
    squared_error,
    unit_squared_error,
)

ERRORS = [error for error, _ in CLOSED_FORMS]
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)


def by_autograd(error, student, teacher):
    student = student.detach().requires_grad_()
    error_T = error(student, teacher)
    return error_T.detach(), torch.autograd.grad(error_T.sum(), student)[0]


def in_closed_form(error, student, teacher):
    found = gradient_of(error)(StatePair(student, teacher))
    return found.error_T, found.weight * found.direction_TA


def pairs(tokens, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student, away = (torch.randn(tokens, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), (0.5 * student + away).to(dtype)


@each_error
@pytest.mark.parametrize(("tokens", "width"), [(0, 5), (1, 1), (7, 5), (50, 33)])
def test_value_and_gradient_are_those_of_the_function(error, tokens, width):
    student, teacher = pairs(tokens, width)
    for got, wanted in zip(in_closed_form(error, student, teacher), by_autograd(error, student, teacher), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@each_error
@pytest.mark.parametrize("distance", [1.0, 1e-3])
def test_in_fp32_it_is_as_near_to_fp64_as_autograd(error, distance):
    student, teacher = pairs(200, 48, torch.float32)
    teacher = torch.lerp(student, teacher, distance)
    exact = by_autograd(error, student.double(), teacher.double())
    found = [evaluate(error, student, teacher) for evaluate in (in_closed_form, by_autograd)]
    for wanted, own, plain in zip(exact, *found, strict=True):
        errors = [(torch.dist(x.double(), wanted) / wanted.norm()).item() for x in (own, plain)]
        assert errors[0] <= 1.2 * errors[1] + 1e-7


@each_error
@pytest.mark.parametrize("empty", ["student", "teacher"])
def test_a_state_of_zeros_is_treated_as_autograd_does(error, empty):
    student, teacher = pairs(3, 5)
    {"student": student, "teacher": teacher}[empty][1] = 0
    for got, wanted in zip(in_closed_form(error, student, teacher), by_autograd(error, student, teacher), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@each_error
def test_equal_states_have_no_error_and_no_gradient(error):
    student, _ = pairs(9, 6, torch.float32)
    error_T, gradient_TD = in_closed_form(error, student, student.clone())
    assert error_T.count_nonzero() == gradient_TD.count_nonzero() == 0


def test_a_teacher_in_bf16_is_compared_in_fp32():
    student, teacher = pairs(40, 24, torch.float32)
    teacher = teacher.bfloat16()
    for error in ERRORS:
        found = in_closed_form(error, student, teacher)
        wanted = in_closed_form(error, student, teacher.float())
        assert all(map(torch.equal, found, wanted))
        assert found[1].dtype == torch.float32


class Passes(TorchDispatchMode):
    """Counts operations on tensors that are as large as the states."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.numel() >= self.size for x in (*args, result)):
            self.found[func.overloadpacket.__name__] += 1
        for free in ("detach", "view", "expand", "unsqueeze", "alias"):
            self.found.pop(free, None)
        return result


@pytest.mark.parametrize(("error", "most"), [(squared_error, 6), (unit_squared_error, 13)])
def test_error_gradient_and_metrics_take_few_passes_over_the_states(error, most):
    student, teacher = pairs(40, 24, torch.float32)
    with Passes(student.numel()) as passes:
        pair = StatePair(student, teacher)
        gradient_of(error)(pair)
        _ = pair.square_T, pair.cosine_T
    assert passes.found.total() <= most, passes.found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalisation", ["none", "l2"])
def test_compiled_errors_are_the_same_numbers(normalisation, dtype):
    loss = HiddenStateMSE(normalisation)
    loss.compile()
    for tokens in (5, 70, 300):  # one graph for all lengths
        states = torch.randn(2, tokens, 32).to(dtype)
        eager, fused = (f(loss.error, *states, 0.25, True) for f in (compared, loss.compared))
        for found, wanted in zip((*fused[:2], *fused[2]), (*eager[:2], *eager[2]), strict=True):
            assert found.dtype == wanted.dtype
            torch.testing.assert_close(found, wanted, rtol=1e-2 if wanted.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_an_error_of_the_users_is_not_compiled():
    loss = HiddenStateLoss(lambda h, g: (h - g).abs().sum(-1))
    loss.compile()
    assert loss.compared is compared
