"""From a teacher's checkpoint to a frozen model: whole, spread over ranks, quantised, or waiting in CPU memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchtune.modules import TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.sharding import Sharding
from oprd_tune.modeling.weights import Builder, build_on_meta, load_weights
from oprd_tune.ranks import Ranks
from oprd_tune.teacher.quantize import check_scheme, quantize_linears, quantized_bytes

PLACEMENTS = ("replicated", "sharded", "offloaded")


@dataclass(frozen=True)
class TeacherPlan:
    """How a run keeps its teacher.

    Attributes:
        placement: `replicated`, whole on each device; `sharded` over all processes, which for one process is the same;
            or `offloaded`, in CPU memory, from where its blocks visit the device one at a time.
        quantization: a scheme of `oprd_tune.teacher.quantize`, or None.
        ranks: the processes of the run.

    Raises:
        ConfigError: if there is no such placement, or the device cannot run the scheme.
    """

    placement: str
    quantization: str | None
    ranks: Ranks

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"teacher_placement is {self.placement!r}; allowed are {', '.join(PLACEMENTS)}")
        if self.quantization is None:
            return
        if self.placement == "offloaded":
            raise ConfigError(
                "teacher_quantization and teacher_placement=offloaded do not go together: a quantised teacher stays on "
                "the device. Give one of the two"
            )
        check_scheme(self.quantization, self.ranks.device, sharded=self.sharded)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of it."""
        return self.placement == "sharded" and self.ranks.world_size > 1

    def load(
        self,
        build: Builder,
        files: FullModelHFCheckpointer,
        *,
        dtype: torch.dtype,
        top: int | None,
        prompts: Sequence[Sequence[int]],
    ) -> tuple[TransformerDecoder, dict[int, float]]:
        """Load it; see `load_teacher`."""
        return load_teacher(
            build,
            files,
            dtype=dtype,
            device=self.ranks.device,
            top=top,
            sharding=Sharding(self.ranks) if self.sharded else None,
            offloaded=self.placement == "offloaded",
            quantization=self.quantization,
            prompts=prompts,
        )

    def memory_bytes(self, model: TransformerDecoder, *, top: int, keeps_head: bool, dtype: torch.dtype) -> int:
        """Bytes of its parameters on one rank's device; of blocks that visit it, at the largest.

        Args:
            model: the whole teacher, on the meta device.
            top: the highest layer that is kept.
            keeps_head: whether a loss reads its head.
            dtype: of what is not quantised.
        """
        blocks = [quantized_bytes(block, self.quantization, dtype) for block in model.layers[:top]]
        embedding, head = model.tok_embeddings.weight.numel() * dtype.itemsize, 0
        tied = isinstance(model.output, TiedLinear)
        if keeps_head and not tied:
            head = sum(p.numel() for p in model.output.parameters()) * dtype.itemsize
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        if self.sharded:
            whole = (embedding if tied else head) + buffers
            return (sum(blocks) + (0 if tied else embedding)) // self.ranks.world_size + whole + 2 * max(blocks)
        return (max(blocks) if self.placement == "offloaded" else sum(blocks)) + embedding + head + buffers


def load_teacher(
    build: Builder,
    checkpointer: FullModelHFCheckpointer,
    *,
    dtype: torch.dtype,
    device: torch.device,
    top: int | None = None,
    sharding: Sharding | None = None,
    offloaded: bool = False,
    quantization: str | None = None,
    prompts: Sequence[Sequence[int]] = (),
) -> tuple[TransformerDecoder, dict[int, float]]:
    """Load a teacher block by block; each one is quantised, spread or moved away before the next is read.

    The LM head stays whole on every rank, since token losses read it in the student's forward pass.

    Args:
        build: builds it.
        checkpointer: where its weights are.
        dtype: of its parameters.
        device: where it computes.
        top: leave out what is above that layer; None loads everything.
        sharding: how to spread it over ranks; None keeps it whole on each.
        offloaded: blocks live in CPU memory and visit the device one at a time.
        quantization: a scheme of `oprd_tune.teacher.quantize`, or None.
        prompts: token ids on which the error of quantisation is measured.

    Returns:
        The teacher with its head, and by layer the relative error ‖g_quantised − g‖ / ‖g‖ of its hidden states over
        the prompts' tokens; empty without quantisation.
    """
    model = build_on_meta(build).requires_grad_(False).eval()
    if top is not None and top < len(model.layers):
        model.layers, model.norm = model.layers[:top], nn.Identity()
    depth = len(model.layers)
    meter: _ErrorMeter | None = None

    def _prepare(number: int, block: nn.Module) -> nn.Module:
        nonlocal meter
        if quantization is not None:
            meter = meter or _ErrorMeter(model, prompts, device)
            meter.run_reference(block)
            quantize_linears(block, quantization, sharded=sharding is not None)
            meter.run_quantised(number, block, norm=model.norm if number == depth else None)
        if sharding is not None:
            sharding.block(block)
        if offloaded:
            _keep_on_cpu(block, device)
        return block

    load_weights(model, checkpointer, dtype=dtype, device=device, on_block=_prepare)
    if sharding is not None:
        sharding.rest(model, whole_head=True)
    return model, meter.errors if meter is not None else {}


class _ErrorMeter:
    """Takes a few prompts through the blocks as they are and as they become, one block at a time."""

    @torch.no_grad()
    def __init__(self, model: TransformerDecoder, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        rows = [torch.tensor(prompt, device=device) for prompt in prompts]
        tokens_BS = pad_sequence(rows, batch_first=True)
        lengths_B1 = torch.tensor([[len(row)] for row in rows], device=device)
        self._real_BS = torch.arange(tokens_BS.shape[1], device=device) < lengths_B1
        self._reference_BSD = self._quantised_BSD = model.tok_embeddings(tokens_BS)
        self.errors: dict[int, float] = {}

    @torch.no_grad()
    def run_reference(self, block: nn.Module) -> None:
        self._reference_BSD = block(self._reference_BSD)

    @torch.no_grad()
    def run_quantised(self, number: int, block: nn.Module, *, norm: nn.Module | None) -> None:
        self._quantised_BSD = block(self._quantised_BSD)
        states = [state_BSD[self._real_BS] for state_BSD in (self._reference_BSD, self._quantised_BSD)]
        reference_TD, quantised_TD = (norm(s).float() if norm is not None else s.float() for s in states)
        self.errors[number] = (torch.dist(quantised_TD, reference_TD) / reference_TD.norm()).item()


def _keep_on_cpu(block: nn.Module, device: torch.device) -> None:
    """Keep a frozen block's parameters in CPU memory; they visit the device for each of its forward passes."""
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
