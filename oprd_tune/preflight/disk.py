"""Whether the files of a run will fit on its disk."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from torchtune.modules import TransformerDecoder

from oprd_tune.config import OPRDSettings
from oprd_tune.preflight.memory import Memory, as_size
from oprd_tune.ranks import Ranks


@dataclass(frozen=True)
class Disk:
    """What a run writes at most, in words, and whether there is room."""

    text: str
    fits: bool


def predict_disk(
    s: OPRDSettings, student: TransformerDecoder, memory: Memory, ranks: Ranks, *, evaluated: bool
) -> Disk:
    """What the run will write at most, and whether there is room. What it replaces as it goes on counts as room.

    `evaluated` says whether the run looks for its best student.
    """
    checkpoint = memory.checkpoint * ranks.world_size
    export = sum(p.numel() for p in student.parameters()) * s.torch_dtype.itemsize
    # One more checkpoint while a new one is written; `final`, `best`, and the old `best` until it is replaced.
    saves = math.ceil(s.max_steps / s.checkpoint_every_n_steps)
    needed = checkpoint * min(s.keep_checkpoints + 1, saves) + (3 if evaluated else 1) * export
    free, kept = ranks.collect(room(Path(s.output_dir)))[0]  # so that all ranks find the same
    text = f"up to {as_size(needed)} of {as_size(free)} free; a checkpoint takes {as_size(checkpoint)}"
    if kept:
        text += f"; {as_size(kept)} are there already"
    return Disk(text, needed < free + kept)


def room(folder: Path) -> tuple[int, int]:
    """Free bytes, and those that a run that resumes will replace or remove: its own folders, and what a crash left."""
    inside = folder / "checkpoints"
    checkpoints = [place for place in inside.glob("step_*") if place.name[5:].isdecimal()]
    leftovers = [place for where in (folder, inside) for place in where.glob(".staged-*")]
    places = [*checkpoints, *leftovers, folder / "best", folder / "final"]
    files = [file for place in places if not place.is_symlink() for file in place.glob("*")]
    free = shutil.disk_usage(inside if inside.exists() else folder).free  # it may be a link to another disk
    return free, sum(file.stat().st_size for file in files if file.is_file())
