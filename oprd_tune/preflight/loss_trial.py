"""Try a config's losses on a few random tokens: a mistake in a loss of the user's would come up in the first step."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from oprd_tune.errors import ConfigError
from oprd_tune.losses.composite import Composite
from oprd_tune.losses.hidden_mse import HiddenStateLoss
from oprd_tune.losses.token_loss import TokenLoss
from oprd_tune.modeling.heads import Heads
from oprd_tune.selection import ResponseTokens

_TOKENS, _WIDTH = 4, 8  # a head of the real width would take gigabytes
_OURS = f"{Path(__file__).parents[1]}{os.sep}"


def try_losses(loss: Composite, *, width: int, vocabulary: int, device: torch.device) -> None:
    """Evaluate each part on made-up tokens, with its gradient.

    Args:
        width: numbers in what a loss on hidden states compares, a state or its projection.
        vocabulary: the size of the vocabulary that student and teacher share.

    Raises:
        ConfigError: if a part fails, with the place in the user's file, or if what it gives is not finite.
    """
    if (hidden := loss.hidden) is not None:
        _try(hidden, lambda: _hidden_state_loss(hidden, width), device)
    for part in loss.token_losses.values():
        _try(part, partial(_token_loss, part, vocabulary), device)


def _try(
    loss: HiddenStateLoss | TokenLoss, evaluate: Callable[[], tuple[Tensor, Tensor]], device: torch.device
) -> None:
    kind, devices = type(loss).__name__, [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.device(device), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(0)
            total, gradient = evaluate()
    except ConfigError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"loss: {kind} fails on made-up tokens: {type(error).__name__}: {said} ({_place(error)})"
        ) from error
    for what, value in (("a loss", total), ("a gradient", gradient)):
        if not bool(value.isfinite().all()):
            raise ConfigError(f"loss: on made-up tokens, {kind} gives {what} that is not finite")


def _place(error: Exception) -> str:
    """The innermost line of the user's, or of anyone's if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and not frame.filename.startswith(_OURS)]
    where = (own or frames)[-1]
    return f"{where.filename}, line {where.lineno}"


def _hidden_state_loss(loss: HiddenStateLoss, width: int) -> tuple[Tensor, Tensor]:
    student_TA, teacher_TA = torch.randn(2, _TOKENS, width)
    total, gradient_TA, _ = loss.compared(loss.error, student_TA, teacher_TA, loss.coefficient, False)
    return total, gradient_TA


@dataclass(frozen=True)
class _Head:
    weight_VD: Tensor
    layer: int = 1


def _token_loss(loss: TokenLoss, vocabulary: int) -> tuple[Tensor, Tensor]:
    weights = [torch.randn(vocabulary, _WIDTH) for _ in range(2)]
    heads = cast(Any, Heads)(_Head(weights[0].requires_grad_()), _Head(weights[1]), vocabulary)
    state_BSD = torch.randn(1, _TOKENS, _WIDTH).requires_grad_()
    log_p_TV = (state_BSD[0] @ weights[0].T).detach().log_softmax(-1)
    top = log_p_TV.topk(min(max(1, loss.sampler_top_k), vocabulary))
    tokens = ResponseTokens(
        index_T=torch.arange(_TOKENS),
        tokens_T=top.indices[:, 0],
        sampler_logprobs_T=top.values[:, 0],
        sampler_top_ids_TK=top.indices,
        sampler_top_mass_T=top.values.exp().sum(-1),
        given_T=torch.arange(_TOKENS) % 2 == 0,  # some losses read given tokens alone, others sampled ones
        advantage_T=torch.ones(_TOKENS),
    )
    stream = loss.stream(heads, torch.randn(_TOKENS, _WIDTH), tokens)
    total = stream(1, state_BSD)
    total.backward()
    assert state_BSD.grad is not None
    return total.detach(), state_BSD.grad
