"""What a run will need, in bytes on each rank, from the models' shapes alone.

Memory peaks while the student samples, in its backward pass, or in the optimizer. Some of it is resident in all three;
each adds what it needs for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torchtune.modules import TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear
from torchtune.training import set_default_dtype

from oprd_tune.config import OPRDSettings
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.weights import Builder
from oprd_tune.ranks import Ranks

_REDUCED = 4  # bytes of a number in a gradient that is averaged over ranks
_GLOO_COPIES = 2  # that gloo makes of a gradient, measured; NCCL makes none


@dataclass(frozen=True)
class Plan:
    """What a run needs memory for, beside its student.

    Attributes:
        settings: of the run.
        ranks: its processes.
        sharded: FSDP2 spreads the student over them.
        trains_head: a loss reads the student's head.
        rows: responses in the largest microbatch of a rank.
        row_tokens: the longest row of it, in tokens.
        selected: states of it that a loss reads at one layer.
        tapped: layers that losses read.
        micro_batches: of a step and rank.
        logit_bytes: chunks of logits.
        rollout_bytes: what sampling takes beside the weights.
        engine_bytes: what an engine with weights of its own holds all the time.
        optimizer_bytes: of state for each number that trains; None if unknown, and then not counted.
        teacher_bytes: the teacher's parameters.
        whole_teacher_bytes: the same while a sharded teacher is gathered to be evaluated; 0 if it never is.
        teacher_width: numbers in a state of the teacher.
        target_width: numbers that the teacher gives a loss for a state: as many, or the rank of a bridge.
        bridge_bytes: a bridge's projectors.
        moment_bytes: what fitting a bridge takes on the device, before the optimizer has a state.
    """

    settings: OPRDSettings
    ranks: Ranks
    sharded: bool
    trains_head: bool
    rows: int
    row_tokens: int
    selected: int
    tapped: int
    micro_batches: int
    logit_bytes: int
    rollout_bytes: int
    engine_bytes: int
    optimizer_bytes: float | None
    teacher_bytes: int
    whole_teacher_bytes: int
    teacher_width: int
    target_width: int
    bridge_bytes: int = 0
    moment_bytes: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        student: its parameters.
        optimizer: its state.
        teacher: its parameters.
        engine: what a sampling engine holds all the time.
        bridge: its projectors.
        sampling: what sampling adds: gathered weights and the cache.
        fitting: what fitting a bridge adds, sampling included, when there is no optimizer's state yet.
        training: what the backward pass adds: gradients, gathered weights, activations, targets, logits.
        gradients: the part of `training` that is left for the optimizer.
        cpu: of CPU memory: a checkpoint's copy while it is written, and what is offloaded.
        checkpoint: the size of a checkpoint's part.
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
        """The most that is needed at once on the device."""
        always = self.student + self.teacher + self.engine + self.bridge
        return always + max(self.fitting, self.optimizer + max(self.sampling, self.training, self.gradients))


def predict_memory(student: TransformerDecoder, build: Builder, plan: Plan) -> Memory:
    """Add up what a run will need.

    Args:
        student: on the meta device, with what stays frozen frozen.
        build: builds the student, to see what its backward pass keeps.
        plan: of the run.
    """
    s, ranks = plan.settings, plan.ranks.world_size
    compute, master = s.torch_dtype.itemsize, s.torch_master_dtype.itemsize
    trained, frozen = _count(student.parameters(), True), _count(student.parameters(), False)
    resident = trained * master + frozen * compute
    optimizer = int(trained * (plan.optimizer_bytes or 0))
    blocks = [_count(block.parameters()) * compute for block in student.layers]
    ends = [_count(module.parameters()) * compute for module in _ends(student)]
    activations = _activations(build, plan, len(student.layers), student.tok_embeddings.embedding_dim)
    targets = plan.tapped * plan.selected * compute * (student.tok_embeddings.embedding_dim + plan.target_width)
    working = activations + targets + plan.logit_bytes
    if not plan.sharded:
        gradients = trained * compute
        embedding = ends[0] if student.tok_embeddings.weight.requires_grad else 0
        again = plan.micro_batches > 1 or (plan.trains_head and isinstance(student.output, TiedLinear))
        return Memory(
            student=resident + _buffers(student),
            optimizer=optimizer,
            teacher=plan.teacher_bytes,
            engine=plan.engine_bytes,
            bridge=plan.bridge_bytes,
            sampling=plan.rollout_bytes,
            fitting=_fitting(plan, plan.rollout_bytes),
            # An embedding's gradient is made dense before it is added to what is there.
            training=gradients + max(working, embedding if again else 0),
            gradients=gradients,
            cpu=trained * master + optimizer,
            checkpoint=trained * master + optimizer,
        )
    held = sum(ends) if plan.trains_head else 0
    passing = held + (2 * max(blocks) if s.fsdp_reshard_after_forward else sum(blocks))
    sampling = max(2 * max(ends), sum(blocks) + sum(ends)) + plan.rollout_bytes
    if plan.whole_teacher_bytes:
        sampling = max(sampling, plan.whole_teacher_bytes + plan.rollout_bytes)
    checkpoint = (trained * master + optimizer) // ranks
    shards = (resident + trained * master + optimizer) // ranks
    on_device = 0 if s.fsdp_cpu_offload else 1
    return Memory(
        student=on_device * resident // ranks + _buffers(student),
        optimizer=on_device * optimizer // ranks,
        teacher=plan.teacher_bytes,
        engine=plan.engine_bytes,
        bridge=plan.bridge_bytes,
        sampling=sampling,
        fitting=_fitting(plan, sampling),
        training=max(passing + working, held + _reduction(student, plan)),
        gradients=on_device * trained * master // ranks,
        cpu=checkpoint + (shards if s.fsdp_cpu_offload else 0),
        checkpoint=checkpoint,
    )


def _fitting(plan: Plan, sampling: int) -> int:
    """Moments, and the largest of what samples, or holds a microbatch's whole states of the teacher."""
    if not plan.moment_bytes:
        return 0
    states = plan.tapped * plan.selected * plan.settings.torch_dtype.itemsize * plan.teacher_width
    return plan.moment_bytes + max(sampling, states)


def optimizer_bytes(
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer], dtype: torch.dtype, device: torch.device
) -> float | None:
    """Bytes of state that an optimizer keeps for each number it trains, found out by a step with a few.

    Returns:
        None for an optimizer that takes no such step.
    """
    parameter = nn.Parameter(torch.zeros(64, 64, dtype=dtype, device=device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer = make_optimizer([parameter])
        optimizer.step()
    except ConfigError:
        raise
    except Exception:  # whatever it wanted, the run itself will tell
        return None
    states = (value for value in optimizer.state[parameter].values() if isinstance(value, Tensor))
    return sum(value.nbytes for value in states if value.ndim) / parameter.numel()


def _count(parameters: Iterable[nn.Parameter], trained: bool | None = None) -> int:
    return sum(p.numel() for p in parameters if trained is None or p.requires_grad == trained)


def _ends(model: TransformerDecoder) -> list[nn.Module]:
    """Embedding and untied head."""
    return [model.tok_embeddings] + ([] if isinstance(model.output, TiedLinear) else [model.output])


def _buffers(model: TransformerDecoder) -> int:
    return sum(buffer.nbytes for buffer in model.buffers())


def _reduction(student: TransformerDecoder, plan: Plan) -> int:
    """Gradients at the moment when the largest group of them is averaged: the others, and its buffers."""
    groups = [_count(module.parameters(), True) for module in (*student.layers, *_ends(student))]
    largest = max(groups)
    s, ranks = plan.settings, plan.ranks
    compute, master = s.torch_dtype.itemsize, s.torch_master_dtype.itemsize
    others = (sum(groups) - largest) * master // ranks.world_size
    kept = 0
    if plan.micro_batches > 1 and not s.sync_every_micro_batch:  # accumulated whole until the last microbatch
        kept = sum(groups) * _REDUCED
    elif plan.micro_batches > 1:
        others += largest * master // ranks.world_size
    copies = _GLOO_COPIES if ranks.device.type == "cpu" and ranks.world_size > 1 else 0
    reducing = (1 + copies) * _REDUCED * largest + max(compute * largest, _REDUCED * largest // ranks.world_size)
    return others + kept + reducing


def _activations(build: Builder, plan: Plan, blocks: int, width: int) -> int:
    """Bytes that the student's forward pass keeps for its backward pass.

    One block runs on tensors without data, and what it would save is counted. A block that is recomputed keeps its
    input alone, but for one at a time all of it.
    """
    with FakeTensorMode(), torch.device("cpu"), set_default_dtype(plan.settings.torch_dtype):
        model = build()
        block = model.layers[0]
        known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        saved: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(count, lambda tensor: tensor):
            block(torch.empty(plan.rows, plan.row_tokens, width, requires_grad=True))
    one, inputs = sum(saved.values()), plan.rows * plan.row_tokens * width * plan.settings.torch_dtype.itemsize
    every = int(plan.settings.activation_checkpointing)
    recomputed = blocks // every if every else 0
    return (blocks - recomputed) * one + recomputed * inputs + (one if recomputed else 0)
