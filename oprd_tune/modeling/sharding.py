"""Shard decoders over ranks with FSDP2, block by block, and gather them again for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torchtune.modules import TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear

from oprd_tune.config import OPRDSettings
from oprd_tune.errors import ConfigError
from oprd_tune.ranks import Ranks, need_process_group

_RESHARD_AFTER_FORWARD: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # settings that `gathered` restores


@dataclass(frozen=True)
class Sharding:
    """How a model is sharded.

    A block is gathered while it runs, and the embedding while it is looked up. In training, an untied head is not
    gathered, unless the loss reads it: it then stays gathered from the forward pass to the end of the backward pass.
    Gradients are averaged over ranks in fp32.

    Attributes:
        compute_dtype: dtype of gathered parameters and of computed gradients; None keeps that of the shards.
        reshard_after_forward: free each block's gathered parameters until the backward pass.
        cpu_offload: keep shards, gradients and the optimizer's state in CPU memory.
    """

    ranks: Ranks
    compute_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        if self.cpu_offload and self.ranks.device.type == "cpu":
            raise ConfigError("fsdp_cpu_offload moves shards out of a GPU's memory; there is none here: leave it out")

    @cached_property
    def _mesh(self) -> DeviceMesh:
        need_process_group(self.ranks)
        return init_device_mesh(self.ranks.device.type, (self.ranks.world_size,))

    def block(self, block: nn.Module) -> None:
        """Shard one loaded block. Every rank must hold the same values; each keeps its own part."""
        self._shard(block, reshard_after_forward=self.reshard_after_forward)

    def rest(self, model: TransformerDecoder, *, gathered_head: bool = False, whole_head: bool = False) -> None:
        """Shard embedding, final norm and head. Call it last, when the blocks of `model` are sharded.

        Args:
            gathered_head: whether a loss reads the head's weight during the model's forward pass.
            whole_head: keep the head, and an embedding tied to it, whole on every rank.
        """
        ends = [model.tok_embeddings] if isinstance(model.output, TiedLinear) else [model.tok_embeddings, model.output]
        head = ends[-1]
        for module in ends[:-1] if gathered_head or whole_head else ends:
            self._shard(module, reshard_after_forward=self.reshard_after_forward)
            module.set_unshard_in_backward(False)  # the backward pass does not read its weights
        self._shard(model, reshard_after_forward=False, ignored=set(head.parameters()) if whole_head else None)

    def _shard(
        self, module: nn.Module, *, reshard_after_forward: bool, ignored: set[nn.Parameter] | None = None
    ) -> None:
        fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=self.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            offload_policy=CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy(),
            ignored_params=ignored,
        )
        _RESHARD_AFTER_FORWARD[module] = reshard_after_forward


def choose_sharding(settings: OPRDSettings, ranks: Ranks) -> Sharding | None:
    """How to shard the student over ranks; None if this process holds the whole student.

    A single process needs neither FSDP2, which would gather a second copy, nor a process group. Two settings need FSDP2
    even then: `fsdp_cpu_offload`, and a `master_dtype` that differs from `dtype`.

    Raises:
        ConfigError: if shards cannot be offloaded here.
    """
    s = settings
    if ranks.world_size == 1 and not s.fsdp_cpu_offload and s.torch_master_dtype == s.torch_dtype:
        return None
    return Sharding(
        ranks,
        compute_dtype=s.torch_dtype,
        reshard_after_forward=s.fsdp_reshard_after_forward,
        cpu_offload=s.fsdp_cpu_offload,
    )


def one_if_it_fits(settings: OPRDSettings, sharding: Sharding | None) -> bool:
    """Whether rows that fit into one microbatch stay in one, because a second one costs memory or much time.

    FSDP2 keeps whole gradients until a step's last microbatch, and an offloaded teacher is copied for each.
    """
    accumulates = sharding is not None and not settings.sync_every_micro_batch
    return accumulates or settings.teacher_placement == "offloaded"


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within the scope, a sharded model is whole on every rank. Any other model is left alone.

    Each rank may then run any number of forward passes. Entering communicates, so all ranks must enter. Changes to the
    gathered parameters are lost at the end.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(_RESHARD_AFTER_FORWARD[module], recurse=False)


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Choose whether the next backward passes of a sharded model average gradients over ranks or only accumulate."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
