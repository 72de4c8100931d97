"""Predict the bytes that a run needs on each rank, from the models' shapes alone.

Memory peaks while the student samples, in its backward pass, or in the optimizer. Some bytes are resident in all three
phases. Each phase adds its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torchtune.modules import TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear
from torchtune.training import set_default_dtype

from oprd_tune.config import OPRDSettings
from oprd_tune.modeling.weights import Builder, build_on_meta
from oprd_tune.preflight.live_bytes import LiveBytes
from oprd_tune.ranks import Ranks
from oprd_tune.torchtune_compat import start_rotations

_GIB = 2**30

_WIDE = 4  # bytes of a number in fp32
_REDUCED = 4  # bytes of each number of a gradient while it is averaged over ranks
_GLOO_COPIES = 2  # gloo makes that many copies of a gradient, as measured; NCCL makes none


@dataclass(frozen=True)
class Plan:
    """What a run needs memory for, beside its student. All numbers are those of one rank.

    Attributes:
        sharded: whether FSDP2 spreads the student over the ranks.
        token_losses: the number of losses that read the student's head.
        rows: responses in the largest microbatch.
        row_tokens: tokens in its longest row.
        selected: states of the microbatch that a loss reads at one layer.
        tapped: the number of layers that a loss on hidden states reads.
        micro_batches: microbatches in a step.
        logit_bytes: chunks of logits, and the gradients of the head that wait.
        reading_bytes: what a teacher's pass over a microbatch takes beside what it gives.
        rollout_bytes: what sampling takes beside the weights.
        engine_bytes: what an engine with weights of its own holds all the time.
        optimizer_bytes: the optimizer's state for each number that trains.
        follows: whether a teacher is the student's moving average.
        teacher_bytes: the teacher's parameters.
        whole_teacher_bytes: a sharded teacher's parameters while it is gathered for its evaluation; 0 if it never is.
        teacher_width: numbers in a state of the teacher.
        target_width: numbers that a loss compares with one state: the teacher's width, or the rank of a bridge.
        bridge_bytes: a bridge's projectors.
        moment_bytes: what the fit of a bridge takes on the device, before the optimizer has a state.
    """

    settings: OPRDSettings
    ranks: Ranks
    sharded: bool
    token_losses: int
    rows: int
    row_tokens: int
    selected: int
    tapped: int
    micro_batches: int
    logit_bytes: int
    rollout_bytes: int
    engine_bytes: int
    optimizer_bytes: float
    follows: bool
    teacher_bytes: int
    whole_teacher_bytes: int
    teacher_width: int
    target_width: int
    reading_bytes: int = 0
    bridge_bytes: int = 0
    moment_bytes: int = 0

    @property
    def trains_head(self) -> bool:
        """Whether a loss reads the student's head."""
        return self.token_losses > 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        student: the student's parameters and buffers.
        engine: what a sampling engine holds all the time.
        bridge: a bridge's projectors.
        sampling: what sampling adds: gathered weights and the cache.
        fitting: what the fit of a bridge adds, sampling included. The optimizer has no state yet.
        training: what the backward pass adds: gradients, gathered weights, activations, targets and logits.
        gradients: the part of `training` that remains for the optimizer.
        cpu: CPU memory for a checkpoint's copy while it is written, and for what is offloaded.
        checkpoint: this rank's part of a checkpoint.
    """

    student: int
    optimizer: int
    teacher: int
    engine: int
    bridge: int
    sampling: int
    fitting: int
    training: int
    gradients: int
    cpu: int
    checkpoint: int

    @property
    def peak(self) -> int:
        """The most bytes that the device needs at once."""
        always = self.student + self.teacher + self.engine + self.bridge
        return always + max(self.fitting, self.optimizer + max(self.sampling, self.training, self.gradients))


def predict_memory(student: TransformerDecoder, build: Builder, plan: Plan) -> Memory:
    """Add up the bytes that a run will need.

    Args:
        student: the student on the meta device, with its frozen parameters frozen.
        build: builds the student again, to find out what its backward pass keeps.
        plan: what else the run needs memory for.
    """
    s, ranks = plan.settings, plan.ranks.world_size
    compute, master = s.torch_dtype.itemsize, s.torch_master_dtype.itemsize
    trained, frozen = _count(student.parameters(), True), _count(student.parameters(), False)
    resident = trained * master + frozen * compute
    optimizer = int(trained * plan.optimizer_bytes)
    on_device = 0 if s.fsdp_cpu_offload else 1
    gradients = on_device * trained * master // ranks
    blocks = [_count(block.parameters()) * compute for block in student.layers]
    ends = [_count(module.parameters()) * compute for module in _ends(student)]
    activations = _activations(build, plan, len(student.layers), student.tok_embeddings.embedding_dim)
    working = max(activations + plan.logit_bytes, plan.reading_bytes)
    working += _waiting(plan, student.tok_embeddings.embedding_dim)
    sampling = plan.rollout_bytes
    if plan.sharded:
        sampling += max(2 * max(ends), sum(blocks) + sum(ends), plan.whole_teacher_bytes)
        held = sum(ends) if plan.trains_head else 0
        passing = held + (2 * max(blocks) if s.fsdp_reshard_after_forward else sum(blocks))
        training = max(passing + working, held + _reduction(student, plan))
    else:
        # An embedding's gradient is made dense before it is added to an earlier one.
        added = plan.micro_batches > 1 or (plan.trains_head and isinstance(student.output, TiedLinear))
        embedding = ends[0] if added and student.tok_embeddings.weight.requires_grad else 0
        training = gradients + max(working, embedding)
    fitted = (plan.tapped + plan.trains_head) * plan.selected * plan.teacher_width * compute  # whole states
    fitting = plan.moment_bytes + max(sampling, fitted) if plan.moment_bytes else 0
    average = trained * _WIDE // ranks if plan.follows else 0
    checkpoint = (trained * master + optimizer) // ranks + average
    offloaded = 0 if on_device else (resident + trained * master + optimizer) // ranks + average
    return Memory(
        student=on_device * resident // ranks + sum(buffer.nbytes for buffer in student.buffers()),
        optimizer=on_device * optimizer // ranks,
        teacher=plan.teacher_bytes + on_device * average,
        engine=plan.engine_bytes,
        bridge=plan.bridge_bytes,
        sampling=sampling,
        fitting=fitting,
        training=training,
        gradients=gradients,
        cpu=checkpoint + offloaded,
        checkpoint=checkpoint,
    )


def _count(parameters: Iterable[nn.Parameter], trained: bool | None = None) -> int:
    return sum(p.numel() for p in parameters if trained is None or p.requires_grad == trained)


def _ends(model: TransformerDecoder) -> list[nn.Module]:
    """The embedding, and the head if it is not tied to the embedding."""
    return [model.tok_embeddings] + ([] if isinstance(model.output, TiedLinear) else [model.output])


def _reduction(student: TransformerDecoder, plan: Plan) -> int:
    """Bytes of gradients while the largest group is averaged over ranks: the other groups, and its own buffers."""
    groups = [_count(module.parameters(), True) for module in (*student.layers, *_ends(student))]
    largest = max(groups)
    s, ranks = plan.settings, plan.ranks
    compute, master = s.torch_dtype.itemsize, s.torch_master_dtype.itemsize
    others = (sum(groups) - largest) * master // ranks.world_size
    kept = 0
    if plan.micro_batches > 1 and not s.sync_every_micro_batch:  # whole gradients accumulate until the last one
        kept = sum(groups) * _REDUCED
    elif plan.micro_batches > 1:
        others += largest * master // ranks.world_size
    copies = _GLOO_COPIES if ranks.device.type == "cpu" and ranks.world_size > 1 else 0
    reducing = (1 + copies) * _REDUCED * largest + max(compute * largest, _REDUCED * largest // ranks.world_size)
    return others + kept + reducing


def _waiting(plan: Plan, width: int) -> int:
    """Bytes of targets, and of gradients of the losses that wait for the backward pass.

    At each layer of a loss on hidden states, a gradient of the same size takes the place of a target. Through a bridge
    both are fp32. Token losses share the teacher's final states, and each has a gradient in the student's.
    """
    compute = plan.settings.torch_dtype.itemsize
    hidden = plan.tapped * plan.target_width * (_WIDE if plan.bridge_bytes else compute)
    final = plan.token_losses * width + plan.trains_head * plan.teacher_width
    return plan.selected * (hidden + final * compute)


def _activations(build: Builder, plan: Plan, blocks: int, width: int) -> int:
    """Bytes that the student's forward pass keeps for its backward pass, and what that takes beside them.

    One block runs on tensors without data, forward and backward, and bytes are counted. A recomputed block keeps its
    input alone. While the backward pass runs through a block, it needs all that the block keeps, and further tensors
    for a moment; that is one block at a time.
    """
    with _block_without_data(build, plan.settings.torch_dtype) as block:
        for parameter in block.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        gradients = [parameter.grad for parameter in block.parameters() if parameter.grad is not None]
        present = [*block.parameters(), *block.buffers(), *gradients]
        known = {tensor.untyped_storage()._cdata for tensor in present}
        saved: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        state_BSD = torch.empty(plan.rows, plan.row_tokens, width, requires_grad=True)
        with LiveBytes(present) as live:
            with saved_tensors_hooks(count, lambda tensor: tensor):
                out_BSD = block(state_BSD)
            out_BSD.backward(torch.empty_like(out_BSD))
    one, inputs = sum(saved.values()), plan.rows * plan.row_tokens * width * plan.settings.torch_dtype.itemsize
    every = int(plan.settings.activation_checkpointing)
    recomputed = blocks // every if every else 0
    return (blocks - recomputed) * one + recomputed * inputs + max(live.peak - one, 0) + (one if recomputed else 0)


def reading_bytes(build: Builder, *, rows: int, columns: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that a forward pass takes that keeps nothing: one block's, and its input."""
    with _block_without_data(build, dtype) as block, torch.no_grad():
        state_BSD = torch.empty(rows, columns, width)
        with LiveBytes([*block.parameters(), *block.buffers()]) as live:
            block(state_BSD + 0)  # a tensor that is counted
    return live.peak


@contextmanager
def _block_without_data(build: Builder, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Within the scope, tensors have no data, and `dtype` is the default. Gives a model's first block."""
    with set_default_dtype(dtype):
        block = build_on_meta(build).layers[0]
    with torch.device("cpu"):
        start_rotations(block)  # not below, because torchtune's scaled rotations look at their numbers
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), set_default_dtype(dtype):
        block.to_empty(device="cpu")
        yield block


def as_size(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB // 10 else f"{count / 2**20:.1f} MiB"
