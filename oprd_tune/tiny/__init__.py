"""The embedded pair: a teacher and a student of 0.8M parameters that add integers, and everything to run them."""

from oprd_tune.tiny.model import checkpointer, lora_tiny_qwen2, tiny_qwen2, tokenizer
from oprd_tune.tiny.task import addition

__all__ = ["addition", "checkpointer", "lora_tiny_qwen2", "tiny_qwen2", "tokenizer"]
