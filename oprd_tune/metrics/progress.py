"""Progress within a step: shown only where a step takes long."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

_SECONDS = 5.0


class LateBar(tqdm):  # type: ignore[type-arg]
    """A progress bar that appears after a few seconds, and leaves when it is done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()
        super().__init__(*args, **{**kwargs, "leave": False})

    def display(self, *args: Any, **kwargs: Any) -> Any:
        """As `tqdm.display`, once it is late enough."""
        return time.monotonic() - self._started > _SECONDS and super().display(*args, **kwargs)
