"""Model families: builders that torchtune lacks, and the names of each family here and in Hugging Face folders.

A family is one file that defines `FAMILY`, and an entry in `FAMILIES`. CONTRIBUTING.md has the steps.
"""

from collections.abc import Mapping

from oprd_tune.modeling.families import qwen2, qwen3
from oprd_tune.modeling.families.family import Family

FAMILIES: Mapping[str, Family] = {"QWEN2": qwen2.FAMILY, "QWEN3": qwen3.FAMILY}  # by a checkpointer's `model_type`

__all__ = ["FAMILIES", "Family"]
