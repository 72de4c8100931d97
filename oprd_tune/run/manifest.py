"""Tell whether a checkpoint is still as it was written.

Once a checkpoint is complete, `manifest.json` in it records the size and the CRC-32 of each file. That finds what
disks, copies and full quotas do to files. It does not stop a person who changes both.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from oprd_tune.errors import ConfigError, DamagedCheckpoint
from oprd_tune.modeling.safe_reading import incomplete
from oprd_tune.run.records import CONFIG, read_config

MANIFEST = "manifest.json"
_FORMAT = "oprd-tune checkpoint 1"
_BLOCK = 4 * 2**20
_AT_ONCE = 4  # files that are checked at the same time


def write_manifest(folder: Path) -> None:
    """Record the files of a complete checkpoint, but for its config, which people may correct. It reads them once."""
    files = [file for file in sorted(folder.iterdir()) if file.name not in (MANIFEST, CONFIG)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        facts = dict(zip((file.name for file in files), pool.map(_facts, files), strict=True))
    unfinished = folder / f".{MANIFEST}"
    with open(unfinished, "w") as out:
        json.dump({"format": _FORMAT, "files": facts}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    os.replace(unfinished, folder / MANIFEST)


def check_whole(folder: Path) -> None:
    """Raise DamagedCheckpoint, with the name of the file, unless a checkpoint is as it was written.

    A checkpoint of an earlier version has no manifest. Of it, only what is missing or too short is found.

    Raises:
        ConfigError: also if the checkpoint holds code.
    """
    read_config(folder)
    try:
        told = _differing(folder) if (folder / MANIFEST).exists() else None
        told = told or incomplete(folder)
    except OSError as error:
        if error.errno != errno.EIO:  # of a bad disk, which gives back no content; others may pass
            raise ConfigError(f"{folder} cannot be read: {error}; try again once it can") from error
        told = str(error)
    if told:
        raise DamagedCheckpoint(f"{folder} is damaged: {told}")


def _differing(folder: Path) -> str | None:
    """What is the first file that differs from the manifest, and how; None if all are as they were."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        files: dict[str, dict[str, Any]] = dict(found["files"])
        wanted = {name: (int(fact["bytes"]), str(fact["crc32"])) for name, fact in files.items()}
    except (OSError, ValueError, TypeError, KeyError):
        return f"{MANIFEST} cannot be read"
    for name, (size, _) in wanted.items():  # the quick checks first
        file = folder / name
        if Path(name).name != name or not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        sums = pool.map(lambda name: _checksum(folder / name), wanted)
        return next((f"{n} has other content" for n, s in zip(wanted, sums, strict=True) if wanted[n][1] != s), None)


def _facts(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "crc32": _checksum(file)}


def _checksum(file: Path) -> str:
    """The CRC-32 of a file, in hexadecimal digits. Other threads go on meanwhile: zlib does not hold Python's lock."""
    found, block = 0, memoryview(bytearray(_BLOCK))
    with open(file, "rb", buffering=0) as source:
        while count := source.readinto(block):
            found = zlib.crc32(block[:count], found)
    return f"{found:08x}"
