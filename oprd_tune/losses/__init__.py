"""Losses as sums: what a recipe divides once by the count of the whole optimizer step."""

from oprd_tune.losses.hidden_mse import HiddenStateMSE

__all__ = ["HiddenStateMSE"]
