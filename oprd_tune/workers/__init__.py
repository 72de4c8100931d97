"""Processes for what must not harm a run: strangers' texts and programs, within limits of time and memory."""

from oprd_tune.workers.process_pool import ProcessPool

__all__ = ["ProcessPool"]
