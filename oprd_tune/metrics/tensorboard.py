"""A TensorBoard logger with what torchtune's lacks: text, figures, and curves that continue after a resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure


class TensorBoardLogger:
    """Writes scalars, texts and figures into the folder `log_dir`, for `tensorboard --logdir`.

    torchtune's `TensorBoardLogger` makes a new folder at every start, which cuts curves in two. This logger continues
    in the same folder. It hides what a crashed run has written after the checkpoint that is resumed.
    """

    def __init__(self, log_dir: str) -> None:
        self._log_dir = log_dir
        self._first_step: int | None = None
        self._open_writer: Any = None

    @property
    def _writer(self) -> Any:
        if self._open_writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._open_writer = SummaryWriter(self._log_dir, purge_step=self._first_step)
        return self._open_writer

    def resume_at(self, step: int) -> None:
        """Hide everything logged at `step` or later. Call it before the first entry."""
        self._first_step = step

    def log(self, name: str, data: float, step: int) -> None:
        """Log one scalar."""
        self._writer.add_scalar(name, data, global_step=step, new_style=True)

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Log several scalars."""
        for name, data in payload.items():
            self.log(name, data, step)

    def log_config(self, config: Any) -> None:
        """Save the config as `torchtune_config.yaml`, as torchtune's loggers do."""
        from torchtune.training.metric_logging import save_config  # slow, and whoever only reads runs needs none of it

        save_config(config)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Log a text; Markdown is rendered."""
        self._writer.add_text(name, text, global_step=step)

    def log_figure(self, name: str, figure: Figure, step: int) -> None:
        """Log a figure as an image."""
        self._writer.add_figure(name, figure, global_step=step)

    def close(self) -> None:
        """Flush and close."""
        if self._open_writer is not None:
            self._open_writer.close()
            self._open_writer = None
