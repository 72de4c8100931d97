"""Which parameters of a student train: those that a loss reaches, except for what the user froze."""

from __future__ import annotations

from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import set_trainable_params
from torchtune.modules.tied_linear import TiedLinear

from oprd_tune.modeling.adapters import adapter_names


def freeze(model: TransformerDecoder, *, top: int, trains_head: bool, freeze_embedding: bool) -> str:
    """Freeze what no loss reaches and what the user froze. If the model has adapters, freeze everything else.

    Returns:
        A sentence for the user that says what stays frozen; empty if everything trains.
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
