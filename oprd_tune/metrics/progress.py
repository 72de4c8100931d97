"""A progress bar for long steps."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

_SECONDS = 5.0


class LateBar(tqdm):  # type: ignore[type-arg]
    """A progress bar that appears after five seconds and disappears when it is done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()
        super().__init__(*args, **{**kwargs, "leave": False})

    def display(self, *args: Any, **kwargs: Any) -> Any:
        """Like `tqdm.display`, but does nothing in the first seconds."""
        return time.monotonic() - self._started > _SECONDS and super().display(*args, **kwargs)
