"""Model families: builders that torchtune lacks, and what each family is called here and in Hugging Face folders.

A family is one file with a `FAMILY`, and an entry in `FAMILIES`; CONTRIBUTING.md has the steps.
"""

from collections.abc import Mapping

from oprd_tune.modeling.families import qwen2, qwen3
from oprd_tune.modeling.families.family import Family

# By `model_type` of a checkpointer.
FAMILIES: Mapping[str, Family] = {"QWEN2": qwen2.FAMILY, "QWEN3": qwen3.FAMILY}

__all__ = ["FAMILIES", "Family"]
