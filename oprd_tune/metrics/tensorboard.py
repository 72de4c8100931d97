"""A TensorBoard logger with what torchtune's lacks: text, figures, and curves that continue after a resume."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# The charts that matter most. TensorBoard sorts its groups by name and opens the first ones.
GLANCE = {
    "eval/accuracy": "accuracy",
    "eval/perplexity": "perplexity",
    "diagnostics/kl": "kl_to_teacher",
    "loss/total": "loss",
    "rollout/response_tokens": "response_tokens",
    "speed/step": "tokens_per_second",
}
_TEACHER = "teacher"  # a run of its own within the folder, so that its numbers are lines in the student's charts


class TensorBoardLogger:
    """Writes scalars, texts and figures into the folder `log_dir`, for `tensorboard --logdir`.

    The scalars of `GLANCE` appear twice: under their own names, and among the few of the first group, `at_a_glance`.
    `eval/teacher_accuracy` and the like are written as the run `teacher`, where they lie in the chart `eval/accuracy`.

    torchtune's `TensorBoardLogger` makes a new folder at every start, which cuts curves in two. This logger continues
    in the same folder. It hides what a crashed run has written after the checkpoint that is resumed.

    Raises:
        OSError: if the folder cannot be made or written.
    """

    def __init__(self, log_dir: str) -> None:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=log_dir):
            pass  # whether it can be written, is known before the run has cost anything
        self._log_dir = log_dir
        self._first_step: int | None = None
        self._writers: dict[str, Any] = {}  # by the folder within `log_dir`

    def _writer(self, folder: str = "") -> Any:
        if folder not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            place = str(Path(self._log_dir) / folder)
            self._writers[folder] = SummaryWriter(place, purge_step=self._first_step)
        return self._writers[folder]

    def resume_at(self, step: int) -> None:
        """Hide everything logged at `step` or later. Call it before the first entry."""
        self._first_step = step

    def log(self, name: str, data: float, step: int) -> None:
        """Log one scalar."""
        folder = ""
        group, _, last = name.rpartition("/")
        if name.startswith("eval/") and last.startswith("teacher_"):
            folder, name = _TEACHER, f"{group}/{last.removeprefix('teacher_')}"
        for chart in (name, f"at_a_glance/{GLANCE[name]}") if name in GLANCE else (name,):
            self._writer(folder).add_scalar(chart, data, global_step=step, new_style=True)

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
        self._writer().add_text(name, text, global_step=step)

    def log_figure(self, name: str, figure: Figure, step: int) -> None:
        """Log a figure as an image."""
        self._writer().add_figure(name, figure, global_step=step)

    def close(self) -> None:
        """Flush and close."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
