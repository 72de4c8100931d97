"""Rollout engines: they sample responses with the student's current weights."""

from oprd_tune.rollout.auto import auto
from oprd_tune.rollout.native import NativeEngine
from oprd_tune.rollout.vllm_colocated import VLLMColocated
from oprd_tune.rollout.vllm_server import VLLMServer

__all__ = ["NativeEngine", "VLLMColocated", "VLLMServer", "auto"]
