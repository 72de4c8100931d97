"""Embedded models that add integers or reverse digits, and the functions that configs need for them."""

from oprd_tune.tiny.model import checkpointer, lora_tiny_qwen2, tiny_qwen2, tokenizer, wide_tiny_qwen2
from oprd_tune.tiny.task import addition, two_tasks

__all__ = ["addition", "checkpointer", "lora_tiny_qwen2", "tiny_qwen2", "tokenizer", "two_tasks", "wide_tiny_qwen2"]
