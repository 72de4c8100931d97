"""Read a checkpoint of torch.distributed.checkpoint without running code that lies in it.

The library's `.metadata` is a pickle, and so is each value that is no tensor, such as a learning rate. It reads both
without limits. A pickle may call any function by its name; here it may call those alone that the library's own
metadata needs, and values come through torch's `weights_only` reader, as tensors do in the library itself.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import metadata as library
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from oprd_tune.errors import ConfigError, DamagedCheckpoint

METADATA, STATE = ".metadata", "state.pt"
_CLASSES = (
    library.BytesStorageMetadata,
    library.ChunkStorageMetadata,
    library.Metadata,
    library.MetadataIndex,
    library.StorageMeta,
    library.TensorProperties,
    library.TensorStorageMetadata,
)


def _place(*parts: str) -> str:
    """The folder where a checkpoint was written, which nobody reads."""
    return "/".join(map(str, parts))


def _layout(name: str) -> torch.layout:
    """A memory layout by its name, such as `torch.strided`."""
    found = vars(torch).get(str(name).removeprefix("torch."))
    if not isinstance(found, torch.layout):
        raise ValueError(f"{name!r} is no layout")
    return found


def _allowed() -> dict[tuple[str, str], Any]:
    """What a `.metadata` file may name, by module and name: only what builds plain data."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    classes = (*_CLASSES, _StorageInfo, _StoragePrefix, _MEM_FORMAT_ENCODING)
    found: dict[tuple[str, str], Any] = {(each.__module__, each.__qualname__): each for each in classes}
    found |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    found |= {("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): _layout}
    # Ours in the place of library classes: a pickle may also change the attributes of what it names.
    paths = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    return found | {(module, name): _place for module in ("pathlib", "pathlib._local") for name in paths}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the library's metadata, and refuses every other name before anything is called."""

    allowed = _allowed()

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return self.allowed[module_name, global_name]
        except KeyError:
            raise _RefusedNameError(f"{module_name}.{global_name}") from None


class _RefusedNameError(Exception):
    """A name that metadata has no use for."""


class SafeReader(FileSystemReader):
    """The library's reader, but for metadata that names anything else than metadata, or files elsewhere."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata.

        Raises:
            DamagedCheckpoint: if the file is missing or damaged.
            ConfigError: if it names code, or a file outside the checkpoint.
        """
        path = Path(self.path) / METADATA
        try:
            found = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        except _RefusedNameError as refused:
            raise ConfigError(
                f"{path} names {refused}, which no checkpoint of ours needs and which may run code; nothing was run. "
                "Take the checkpoint from someone you trust"
            ) from None
        except Exception as error:  # whatever bytes that are no pickle lead to
            raise DamagedCheckpoint(f"{path} is missing or damaged: {why(error)}") from error
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise DamagedCheckpoint(f"{path} is damaged: it does not describe a checkpoint")
        _check_places(path, found.storage_data)
        found.storage_meta = library.StorageMeta(load_id=self.load_id)
        return found


class _SafePlanner(DefaultLoadPlanner):
    """The library's planner. What is no tensor passes through the `weights_only` reader before the library sees it."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        harmless = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), harmless)
        harmless.seek(0)
        super().load_bytes(read_item, harmless)


def read_metadata(checkpoint: Path) -> Metadata:
    """What a checkpoint holds. Raises ConfigError as `SafeReader.read_metadata` does."""
    return SafeReader(checkpoint).read_metadata()


def load_tensors(into: dict[str, Any], checkpoint: Path, *, no_dist: bool) -> None:
    """Overwrite the tensors and values of a nested state dict with those of a checkpoint.

    Raises:
        ConfigError: if the checkpoint is damaged, lacks one of them, or tries to run code.
    """
    reader = SafeReader(checkpoint)
    reader.read_metadata()  # so that what is wrong with it is said in one line, not in the library's traceback
    try:
        load(into, storage_reader=reader, planner=_SafePlanner(), no_dist=no_dist)
    except CheckpointException as error:
        raise DamagedCheckpoint(f"{checkpoint} cannot be loaded: {why(error)}") from error


def load_state(checkpoint: Path) -> Mapping[str, Any]:
    """The content of `state.pt`: plain values and tensors. Raises ConfigError if the file is damaged or holds code."""
    path = checkpoint / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}" if named else why(error)
        raise ConfigError(f"{path} holds more than plain values ({reason}); it is not read, and nothing ran") from error
    except Exception as error:  # whatever damaged bytes lead to
        raise DamagedCheckpoint(f"{path} is missing or damaged: {why(error)}") from error
    if not isinstance(state, Mapping) or not {"step", "rng", "parts"} <= state.keys():
        raise DamagedCheckpoint(f"{path} is damaged: it lacks step, rng or parts")
    return cast(Mapping[str, Any], state)


def incomplete(checkpoint: Path) -> str | None:
    """Which file of a checkpoint is missing or shorter than its metadata says; None if none is. Reads little.

    Raises:
        ConfigError: if a file is a link, which may lead anywhere.
    """
    if links := [entry.name for entry in checkpoint.iterdir() if entry.is_symlink()]:
        raise ConfigError(f"{checkpoint / links[0]} is a link; a checkpoint has only files of its own")
    if not zipfile.is_zipfile(checkpoint / STATE):  # the table of a zip stands at its end
        return f"{STATE} is missing or damaged"
    try:
        stored = read_metadata(checkpoint).storage_data
    except DamagedCheckpoint:
        return f"{METADATA} is missing or damaged"
    wanted: dict[str, int] = {}
    for place in stored.values():
        wanted[place.relative_path] = max(wanted.get(place.relative_path, 0), place.offset + place.length)
    for name, size in wanted.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size < size:
            return f"{name} has {file.stat().st_size:,} bytes, of at least {size:,}"
    return None


def _check_places(path: Path, stored: Mapping[Any, Any]) -> None:
    """Raise ConfigError unless all data lies in plain files of the checkpoint itself."""
    for place in stored.values():
        name = getattr(place, "relative_path", None)
        if not isinstance(name, str) or Path(name).name != name or getattr(place, "transform_descriptors", None):
            raise ConfigError(f"{path} names {name!r} as a file of the checkpoint; only plain files beside it are read")
        if not all(isinstance(getattr(place, part, None), int) for part in ("offset", "length")):
            raise DamagedCheckpoint(f"{path} is damaged: it does not say where {name} has its tensors")


def why(error: BaseException) -> str:
    """An error's reason in one line: the first rank's, if the library has collected those of all ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
