"""Rollout engines: they sample responses with the student's current weights."""

from oprd_tune.rollout.auto import auto, choose_engine
from oprd_tune.rollout.native.engine import NativeEngine
from oprd_tune.rollout.vllm.colocated import VLLMColocated
from oprd_tune.rollout.vllm.server import VLLMServer

__all__ = ["NativeEngine", "VLLMColocated", "VLLMServer", "auto", "choose_engine"]
