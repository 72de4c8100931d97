"""Qwen2 and Qwen2.5: torchtune has the builders and the conversions."""

from __future__ import annotations

from functools import partial

from oprd_tune.modeling.families.family import Family
from oprd_tune.torchtune_compat import qwen2_hf_to_tune, qwen2_tune_to_hf

_SIZES = {"num_heads": 1, "num_kv_heads": 1, "dim": 1}  # the conversions require these but do not use them
FAMILY = Family("Qwen2", "qwen2", partial(qwen2_hf_to_tune, **_SIZES), partial(qwen2_tune_to_hf, **_SIZES))
