"""Loads a teacher's checkpoint as a frozen model: replicated, sharded, offloaded to CPU memory, or quantised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.sharding import Sharding
from oprd_tune.modeling.weights import Builder, build_on_meta, load_weights
from oprd_tune.protocols import TeacherFiles
from oprd_tune.ranks import Ranks
from oprd_tune.teacher.block_placement import BlockCall, BlockPlacement, Placing
from oprd_tune.teacher.quantize import check_scheme, quantized_bytes

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
        blocks = self._block_bytes(model, dtype)[:top]
        embedding, head = model.tok_embeddings.weight.numel() * dtype.itemsize, 0
        tied = isinstance(model.output, TiedLinear)
        if keeps_head and not tied:
            head = sum(p.numel() for p in model.output.parameters()) * dtype.itemsize
        others = sum(p.numel() for part in _other_parts(model) for p in part.parameters()) * dtype.itemsize
        kept = (model.tok_embeddings, *model.layers[:top], *_other_parts(model))
        others += sum(buffer.nbytes for buffer in {b for part in kept for b in part.buffers()})
        if self.sharded:
            whole = (embedding if tied else head) + others
            return (sum(blocks) + (0 if tied else embedding)) // self.ranks.world_size + whole + 2 * max(blocks)
        return (max(blocks) if self.placement == "offloaded" else sum(blocks)) + embedding + head + others

    def _block_bytes(self, model: TransformerDecoder, dtype: torch.dtype) -> list[int]:
        published: list[int] | None = getattr(model, "published_block_bytes", None)
        if published is None:
            return [quantized_bytes(block, self.quantization, dtype) for block in model.layers]
        if self.quantization is not None:
            raise ConfigError(
                f"teacher_quantization is {self.quantization}, but the teacher's checkpoint is quantised already; "
                "leave it out"
            )
        if self.sharded or self.placement == "offloaded":
            raise ConfigError(
                f"teacher_placement is {self.placement}, but a teacher whose checkpoint is quantised cannot be taken "
                "apart; give replicated"
            )
        return published


def _other_parts(model: nn.Module) -> list[nn.Module]:
    """What a decoder has besides embedding, blocks, norm and head, such as learned positions."""
    counted = ("tok_embeddings", "layers", "norm", "output")  # the norm is too small to count
    return [part for name, part in model.named_children() if name not in counted]


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

    The LM head stays whole on every rank, since token losses read it in the student's forward pass. A checkpointer that
    is `TeacherFiles` loads by itself; `build` is then not called.

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
    placing = Placing(device, sharding, offloaded, quantization, prompts)
    if isinstance(checkpointer, TeacherFiles):
        return checkpointer.load_teacher(dtype=dtype, top=top, placing=placing)
    model = build_on_meta(build).requires_grad_(False).eval()
    if top is not None and top < len(model.layers):
        model.layers, model.norm = model.layers[:top], nn.Identity()

    def calls(tokens_BS: Tensor) -> tuple[Tensor, BlockCall]:
        return model.tok_embeddings(tokens_BS), lambda _, block, state_BSD: block(state_BSD)

    place = BlockPlacement(model, len(model.layers), calls, placing)
    load_weights(model, checkpointer, dtype=dtype, device=device, on_block=place)
    if sharding is not None:
        sharding.rest(model, whole_head=True)
    return model, place.errors
