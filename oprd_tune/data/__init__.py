"""Prompts and reference answers: their sources, their tokens and their order."""

from oprd_tune.data.alignment import PromptReader, Reader
from oprd_tune.data.prompt_sources import prompt_dataset
from oprd_tune.data.prompts import PromptDataset
from oprd_tune.data.routing import RoutedPrompts
from oprd_tune.data.stream import PromptStream
from oprd_tune.data.tokenizer import HuggingFaceTokenizer

__all__ = [
    "HuggingFaceTokenizer",
    "PromptDataset",
    "PromptReader",
    "PromptStream",
    "Reader",
    "RoutedPrompts",
    "prompt_dataset",
]
