"""Working on torchtune decoders: loading, taps, heads, layer pairs, sharding, adapters."""

from oprd_tune.modeling.load import hugging_face_checkpointer

__all__ = ["hugging_face_checkpointer"]
