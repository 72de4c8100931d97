"""A Weights & Biases logger with what torchtune's lacks: texts, figures, and a run that goes on after a resume."""

from __future__ import annotations

import secrets
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from torchtune.training.metric_logging import WandBLogger as _WandBLogger

_ID_FILE = "wandb_run_id"


class WandBLogger(_WandBLogger):
    """torchtune's logger, which also takes texts and figures.

    Its run has an identity, kept in `log_dir`, so that a run that resumes goes on in the same charts. What a crashed
    run had logged after its last checkpoint is logged again, at the same `global_step`.

    Args:
        log_dir: a folder for W&B's files; recipes give one in the run's folder.
        project: W&B's project.
        entity: W&B's entity; None takes the user's own.
        group: groups runs in W&B; None does not.
        further: handed to `wandb.init`, such as `mode: offline` or `name`.

    Raises:
        ImportError: if wandb is not installed: `pip install 'oprd-tune[wandb]'`.
    """

    def __init__(
        self,
        log_dir: str,
        project: str = "oprd-tune",
        entity: str | None = None,
        group: str | None = None,
        **further: Any,
    ) -> None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise ImportError("wandb is not installed; pip install 'oprd-tune[wandb]'") from error
        folder = Path(log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / _ID_FILE
        known = kept.read_text().strip() if kept.exists() else ""
        if not known or not any((folder.parent / "checkpoints").glob("*")):  # nothing to resume from: another run
            known = secrets.token_hex(4)
            kept.write_text(known)
        identity = {"id": known, "resume": "allow", "allow_val_change": True}  # a resumed run may change some settings
        super().__init__(project, entity, group, log_dir, **identity | further)

    def resume_at(self, step: int) -> None:
        """Nothing to do: the run goes on by its identity, and W&B cannot hide what a crashed run had logged."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Log a text as it is."""
        self.log(name, self._wandb.Html(f"<pre>{escape(text)}</pre>"), step)

    def log_figure(self, name: str, figure: Figure, step: int) -> None:
        """Log a figure as an image."""
        picture = BytesIO()
        figure.savefig(picture, format="png")
        self.log(name, self._wandb.Image(Image.open(picture)), step)
