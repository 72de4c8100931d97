"""The student: what trains, what is recomputed, what is compiled, how it is spread over ranks."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import set_trainable_params
from torchtune.modules.tied_linear import TiedLinear
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.adapters import adapter_names
from oprd_tune.modeling.load import Builder, build_on_meta, load_weights
from oprd_tune.modeling.sharding import Sharding
from oprd_tune.ranks import Ranks

_DRIFT_ROWS = 1024


def load_student(
    build: Builder,
    checkpointer: FullModelHFCheckpointer,
    *,
    top: int,
    trains_head: bool,
    freeze_embedding: bool,
    activation_checkpointing: bool | int,
    compile: bool,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    master_dtype: torch.dtype | None = None,
    sharding: Sharding | None = None,
) -> TransformerDecoder:
    """Load a student, ready to train. What stays frozen is told to the user.

    Args:
        build: builds it; with LoRA or DoRA, only the adapters train.
        checkpointer: where its weights are.
        top: the highest tapped layer, from 1.
        trains_head: whether the loss reaches the LM head. A tied head is its embedding and trains with it.
        freeze_embedding: keep the embedding, and with it a tied head, as it is.
        activation_checkpointing: recompute every block in the backward pass (True), every n-th (n), or none (False).
        compile: compile each block.
        seed: of adapters' first values; the same on all ranks.
        dtype: of the parameters.
        device: where they go.
        master_dtype: of those that train; None for `dtype`.
        sharding: how to spread it over ranks, each block as soon as it is loaded; None leaves it whole.
    """
    model = build_on_meta(build)
    if activation_checkpointing > len(model.layers):
        raise ConfigError(
            f"activation_checkpointing is {activation_checkpointing}, but the student has {len(model.layers)} blocks, "
            "so none would be recomputed; give true, or a smaller number"
        )
    if frozen := freeze(model, top=top, trains_head=trains_head, freeze_embedding=freeze_embedding):
        print(frozen)

    def prepare(number: int, block: nn.Module) -> nn.Module:
        if compile:
            block.compile(backend=os.environ.get("TORCH_COMPILE_BACKEND", "inductor"))  # torchtune's variable
        if activation_checkpointing and number % activation_checkpointing == 0:
            block = checkpoint_wrapper(block, preserve_rng_state=_draws_noise(block))
        if sharding is not None:
            sharding.block(block)
        return block

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        load_weights(model, checkpointer, dtype=dtype, device=device, trained_dtype=master_dtype, on_block=prepare)
    if sharding is not None:
        sharding.rest(model, gathered_head=trains_head)
    return model.train()


def freeze(model: TransformerDecoder, *, top: int, trains_head: bool, freeze_embedding: bool) -> str:
    """Freeze what the loss cannot reach, what the user froze, and beside adapters everything else.

    Returns:
        What stays frozen, as a sentence for the user; empty if nothing does.
    """
    frozen = []
    if adapters := adapter_names(model):
        frozen.append("everything but the adapters")
        set_trainable_params(model, adapters)
    if top < len(model.layers):
        frozen.append(f"blocks above layer {top} and the final norm")
        model.layers[top:].requires_grad_(False)
        model.norm.requires_grad_(False)
    if not trains_head and not isinstance(model.output, TiedLinear):
        frozen.append("the LM head")
        model.output.requires_grad_(False)
    if freeze_embedding:
        frozen.append("the embedding")
        model.tok_embeddings.requires_grad_(False)
    return f"Not trained, since the loss does not reach it or you froze it: {', '.join(frozen)}." if frozen else ""


def _draws_noise(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.modules())


class TiedHeadDrift:
    """How far an embedding that serves as LM head too has moved, judged by evenly spaced rows.

    Args:
        model: the student as it is before training.
        ranks: the processes that it is spread over.
    """

    def __init__(self, model: TransformerDecoder, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        moves = isinstance(model.output, TiedLinear) and model.tok_embeddings.weight.requires_grad
        self._start_RD = self._start_of(model) if moves else None

    def _start_of(self, model: TransformerDecoder) -> Tensor:
        own_RD, places_R = self._own_rows(model)
        start_RD = own_RD.new_zeros(len(range(*self._spacing(model))), own_RD.shape[1])
        start_RD[places_R] = own_RD
        return self._ranks.gather(start_RD.flatten()).sum(0).view_as(start_RD).to(own_RD.device)

    @staticmethod
    def _spacing(model: TransformerDecoder) -> tuple[int, int, int]:
        rows = model.tok_embeddings.weight.shape[0]
        return 0, rows, -(-rows // _DRIFT_ROWS)

    def _own_rows(self, model: TransformerDecoder) -> tuple[Tensor, Tensor]:
        """The judged rows that lie on this rank, in fp32, and their places among all judged rows."""
        weight_VD = model.tok_embeddings.weight.detach()
        first = 0
        if isinstance(weight_VD, DTensor):  # FSDP cuts rows into equal chunks, the last one shorter
            first = self._ranks.rank * -(-weight_VD.shape[0] // self._ranks.world_size)
            weight_VD = weight_VD.to_local()
        rows_R = torch.arange(*self._spacing(model), device=weight_VD.device)
        places_R = ((rows_R >= first) & (rows_R < first + len(weight_VD))).nonzero(as_tuple=True)[0]
        return weight_VD[rows_R[places_R] - first].float(), places_R

    def measure(self, model: TransformerDecoder) -> float | None:
        """‖W − W₀‖ / ‖W₀‖; None for a head that is untied or does not move."""
        if self._start_RD is None:
            return None
        own_RD, places_R = self._own_rows(model)
        (moved,) = self._ranks.total([(own_RD - self._start_RD[places_R]).double().square().sum().item()])
        return (moved / self._start_RD.double().square().sum().item()) ** 0.5

    def state_dict(self) -> dict[str, Tensor | None]:
        """The rows at the start, so that a resumed run measures from there too."""
        return {"start": self._start_RD}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Measure from a checkpoint's start."""
        if self._start_RD is not None:
            self._start_RD.copy_(state["start"])
