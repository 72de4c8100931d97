"""The logger of all ranks but the first."""

from __future__ import annotations

from typing import Any


class SilentLogger:
    """Takes everything that a metric logger takes, and keeps none of it."""

    def log_dict(self, payload: Any, step: int) -> None:
        """Forget it."""

    def log_config(self, config: Any) -> None:
        """Forget it."""

    def close(self) -> None:
        """Nothing is open."""
