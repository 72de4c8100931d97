"""Which components a checkpoint's own config may name. A component is called, so a stranger's config could run code."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterator, Mapping

from oprd_tune.config import Component
from oprd_tune.errors import ConfigError

# Public names of these rooms build models or read weights. Elsewhere in both packages, functions write files or call
# what they are told to.
_ROOMS = re.compile(r"(oprd_tune\.modeling|oprd_tune\.tiny|torchtune\.models\.\w+)\.(\w+)")
_READERS = re.compile(r"(torchtune\.training)\.(\w+Checkpointer)")


def find_trusted(name: str, section: object, trust: Collection[str] = ()) -> Component:
    """Find a component of a checkpoint's config, if it is one of ours or of torchtune's, or one that the user trusts.

    Args:
        name: the section's key.
        section: plain values.
        trust: dotted paths of further components.

    Raises:
        ConfigError: if the section names any other component. Nothing has been imported for it then.
    """
    for path in _paths(section):
        if path not in trust and not _is_ours(path):
            raise ConfigError(
                f"the checkpoint's config.yaml names {path!r} in {name}, which is no builder of torchtune's or "
                f"oprd_tune's and might run anything; if you trust it, add --trust {path}"
            )
    return Component.find(name, section)


def _is_ours(path: str) -> bool:
    found = _ROOMS.fullmatch(path) or _READERS.fullmatch(path)
    if found is None:
        return False
    try:
        return found[2] in importlib.import_module(found[1]).__all__
    except (ImportError, AttributeError):
        return False


def _paths(section: object) -> Iterator[str]:
    """Every dotted path in a section, however deep it lies."""
    if isinstance(section, Mapping):
        if "_component_" in section:
            yield str(section["_component_"])
        for inner in section.values():
            yield from _paths(inner)
    elif isinstance(section, (list, tuple)):
        for inner in section:
            yield from _paths(inner)
