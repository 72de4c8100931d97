"""Preparing the student: what trains, what is recomputed, what is compiled."""

from __future__ import annotations

import torch
from torch import Tensor
from torchtune import training
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.tied_linear import TiedLinear

_DRIFT_ROWS = 1024


def prepare_student(
    model: TransformerDecoder,
    *,
    top: int,
    trains_head: bool,
    freeze_embedding: bool,
    activation_checkpointing: bool,
    compile: bool,
) -> str:
    """Freeze what the loss cannot reach, then wrap and compile the blocks.

    Args:
        model: the loaded student.
        top: the highest tapped layer, from 1.
        trains_head: whether the loss reaches the LM head. A tied head is its embedding and trains with it.
        freeze_embedding: keep the embedding, and with it a tied head, as it is.
        activation_checkpointing: recompute each block in the backward pass.
        compile: compile each block.

    Returns:
        What stays frozen, as a sentence for the user; empty if nothing does.
    """
    frozen = []
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
    if activation_checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    if compile:
        training.compile_model(model, verbose=False)
    model.train()
    return f"Not trained, since the loss does not reach it or you froze it: {', '.join(frozen)}." if frozen else ""


class TiedHeadDrift:
    """How far an embedding that serves as LM head too has moved, judged by evenly spaced rows.

    Args:
        model: the student as it is before training.
    """

    def __init__(self, model: TransformerDecoder) -> None:
        self._tied = isinstance(model.output, TiedLinear)
        self._start_RD = self._rows(model).clone() if self._tied else None

    @staticmethod
    def _rows(model: TransformerDecoder) -> Tensor:
        weight_VD = model.tok_embeddings.weight.detach()
        return weight_VD[:: -(-weight_VD.shape[0] // _DRIFT_ROWS)].float()

    def measure(self, model: TransformerDecoder) -> float | None:
        """‖W − W₀‖ / ‖W₀‖; None for an untied head."""
        if self._start_RD is None:
            return None
        return (torch.dist(self._rows(model), self._start_RD) / self._start_RD.norm()).item()

    def state_dict(self) -> dict[str, Tensor | None]:
        """The rows at the start, so that a resumed run measures from there too."""
        return {"start": self._start_RD}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Measure from a checkpoint's start."""
        if self._start_RD is not None:
            self._start_RD.copy_(state["start"])
