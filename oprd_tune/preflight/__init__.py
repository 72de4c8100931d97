"""Checks, before any weights are read, of what a run reads, does and needs."""

from oprd_tune.preflight.data import load_data
from oprd_tune.preflight.pair import load_pairs
from oprd_tune.preflight.report import preflight

__all__ = ["load_data", "load_pairs", "preflight"]
