"""What is done to each block of a frozen teacher as soon as it is loaded: quantise it, shard it, keep it on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from oprd_tune.modeling.sharding import Sharding
from oprd_tune.teacher.quantize import quantize_linears

BlockCall = Callable[[int, nn.Module, Tensor], Tensor]
# Given right-padded tokens: the first block's input, and a function that runs a block.
BlockCalls = Callable[[Tensor], tuple[Tensor, BlockCall]]


@dataclass(frozen=True)
class Placing:
    """Where and how a teacher's blocks are stored.

    Attributes:
        device: where the model computes.
        sharding: how to spread blocks over ranks; None keeps them whole on each.
        offloaded: whether blocks stay in CPU memory and move to the device one by one.
        quantization: a key of `oprd_tune.teacher.quantize.SCHEMES`, or None.
        prompts: token ids on which the error of quantisation is measured.
    """

    device: torch.device
    sharding: Sharding | None = None
    offloaded: bool = False
    quantization: str | None = None
    prompts: Sequence[Sequence[int]] = ()


class BlockPlacement:
    """Quantises, shards or offloads loaded blocks, in ascending order.

    Args:
        model: the teacher. Its embedding and norm are loaded before the first block comes.
        depth: the number of the last block that will come.
        calls: how the model runs its blocks.

    Attributes:
        errors: by layer, the relative error ‖g_quantised − g‖ / ‖g‖ of its states; empty without quantisation.
    """

    def __init__(self, model: Any, depth: int, calls: BlockCalls, placing: Placing) -> None:
        self._model, self._depth, self._calls, self._placing = model, depth, calls, placing
        self._meter: _ErrorMeter | None = None
        self.errors: dict[int, float] = {}

    def __call__(self, number: int, block: nn.Module) -> nn.Module:
        """Place a block that is loaded on the device; returns the block to use."""
        placing = self._placing
        if placing.quantization is not None:
            self._meter = self._meter or _ErrorMeter(self._calls, placing)
            self._meter.run_reference(number, block)
            quantize_linears(block, placing.quantization, sharded=placing.sharding is not None)
            norm = self._model.norm if number == self._depth else None
            self.errors[number] = self._meter.run_quantised(number, block, norm=norm)
        if placing.sharding is not None:
            placing.sharding.block(block)
        if placing.offloaded:
            _keep_on_cpu(block, placing.device)
        return block


class _ErrorMeter:
    """Runs a few prompts through each block before and after quantisation, and compares the states."""

    @torch.no_grad()
    def __init__(self, calls: BlockCalls, placing: Placing) -> None:
        device = placing.device
        rows = [torch.tensor(prompt, device=device) for prompt in placing.prompts]
        tokens_BS = pad_sequence(rows, batch_first=True)
        lengths_B1 = torch.tensor([[len(row)] for row in rows], device=device)
        self._real_BS = torch.arange(tokens_BS.shape[1], device=device) < lengths_B1
        self._quantised_BSD, self._call = calls(tokens_BS)
        self._reference_BSD = self._quantised_BSD

    @torch.no_grad()
    def run_reference(self, number: int, block: nn.Module) -> None:
        self._reference_BSD = self._call(number, block, self._reference_BSD)

    @torch.no_grad()
    def run_quantised(self, number: int, block: nn.Module, *, norm: nn.Module | None) -> float:
        """The relative error of the quantised block's states."""
        self._quantised_BSD = self._call(number, block, self._quantised_BSD)
        states = [state_BSD[self._real_BS] for state_BSD in (self._reference_BSD, self._quantised_BSD)]
        reference_TD, quantised_TD = (norm(s).float() if norm is not None else s.float() for s in states)
        return (torch.dist(quantised_TD, reference_TD) / reference_TD.norm()).item()


def _keep_on_cpu(block: nn.Module, device: torch.device) -> None:
    """Keep a frozen block's parameters in CPU memory, and move them to the device for each forward pass."""
    homes: list[tuple[nn.Parameter, Tensor]] = []
    for parameter in block.parameters():
        home = parameter.data.cpu()
        homes.append((parameter, home.pin_memory() if device.type == "cuda" else home))

    def leave(*_: object) -> None:
        for parameter, home in homes:
            parameter.data = home

    def visit(*_: object) -> None:
        for parameter, home in homes:
            parameter.data = home.to(device, non_blocking=True)

    leave()
    block.register_forward_pre_hook(visit)
    block.register_forward_hook(leave, always_call=True)
