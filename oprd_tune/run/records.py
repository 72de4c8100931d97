"""The config in a run's folder and in each of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from oprd_tune.errors import DamagedCheckpoint

CONFIG = "config.yaml"


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the run that wrote a folder, as plain values; raises DamagedCheckpoint if it is unreadable."""
    path = folder / CONFIG
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{path} is missing or damaged: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not found:
        raise DamagedCheckpoint(f"{path} is damaged: it holds no config")
    return {str(key): value for key, value in found.items()}


def write_config(record: Mapping[str, Any], folder: Path) -> None:
    """Write a config's plain values as `config.yaml`."""
    OmegaConf.save(OmegaConf.create(dict(record)), folder / CONFIG)
