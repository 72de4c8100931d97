"""Loads a teacher's checkpoint as a frozen model: replicated, sharded, offloaded to CPU memory, or quantised."""

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
    """Where and how a run stores its teacher.

    Attributes:
        placement: `replicated` keeps it whole on each device; `sharded` spreads it over all ranks, which makes no
            difference for one rank; `offloaded` keeps it in CPU memory and moves its blocks to the device one by one.
        quantization: a key of `oprd_tune.teacher.quantize.SCHEMES`, or None.

    Raises:
        ConfigError: if the placement is unknown, or if the device cannot run the scheme.
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
        """Whether each rank holds a part of the teacher."""
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
        """Load the teacher as planned, with `load_teacher`."""
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
        """Bytes of the teacher's parameters on one rank's device. Of offloaded blocks, only the largest counts.

        Args:
            model: the whole teacher, on the meta device.
            top: the highest layer that is kept.
            keeps_head: whether a loss reads the head.
            dtype: the dtype of everything that is not quantised.
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
    """Load a teacher block by block. Each block is quantised, sharded or offloaded before the next one is read.

    The LM head stays whole on every rank, since token losses read it in the student's forward pass.

    Args:
        top: the highest layer to load; None loads everything.
        sharding: how to spread the teacher over ranks; None keeps it whole on each.
        offloaded: whether blocks stay in CPU memory and move to the device one by one.
        quantization: a key of `oprd_tune.teacher.quantize.SCHEMES`, or None.
        prompts: token ids on which the error of quantisation is measured.

    Returns:
        The teacher with its head, and by layer the relative error ‖g_quantised − g‖ / ‖g‖ of its hidden states over
        the prompts' tokens. The errors are empty without quantisation.
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
    """Runs a few prompts through each block before and after quantisation, and compares the states."""

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
