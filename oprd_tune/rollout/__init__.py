"""Rollout engines: they sample responses with the student's current weights."""

from oprd_tune.rollout.native import NativeEngine

__all__ = ["NativeEngine"]
