"""A run's config as short, flat keys, and the keys in which several configs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ABSENT = "–"
# What says where a run is, or that it was resumed, and nothing about what it computes.
_PLACES = ("output_dir", "resume", "metric_logger.log_dir")
_MODELS = {"student": "", "teacher": "teacher_"}


def short_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config that a run has written, without its places, as one level of keys such as `optimizer.lr`.

    `student` and `teacher` are named again where the sections say no more than their folders. A component stands under
    its section's name, as in `loss: oprd_tune.losses.HiddenStateMSE`.
    """
    flat = {key: value for key, value in _flatten(config) if key not in _PLACES}
    folders = {}
    for model, prefix in _MODELS.items():
        folder = flat.get(f"{prefix}model.path")
        if folder is not None and folder == flat.get(f"{prefix}checkpointer.checkpoint_dir"):
            folders[folder] = model
            name = flat.get(f"{prefix}checkpointer.hub_name", folder)
            for key in ("model.path", "checkpointer.checkpoint_dir", "checkpointer.hub_name"):
                flat.pop(prefix + key, None)
            flat = {model: name, **flat}
    for key in ("tokenizer.path", "teacher_tokenizer.path"):
        if flat.get(key) in folders:
            flat[key] = f"the {folders[flat[key]]}'s"
    return flat


def differing_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that are absent in some configs, or whose values are not the same in all; in the configs' order."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if any(one.get(key, ABSENT) != settings[0].get(key, ABSENT) for one in settings)]


def shown_values(values: Sequence[Any]) -> list[str]:
    """The values of one key for reading: of dotted paths and folders the last part, if that tells them apart."""
    whole = [_as_yaml(value) for value in values]
    for mark in (".", "/"):
        is_path = [isinstance(v, str) and mark in v and " " not in v for v in values]
        if any(is_path):
            last = [text.rpartition(mark)[2] if path else text for text, path in zip(whole, is_path, strict=True)]
            if len(set(last)) == len(set(whole)):
                return last
    return whole


def _flatten(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        if key == "_component_":
            found.append((prefix.removesuffix("."), value))
        elif isinstance(value, Mapping):
            found += _flatten(value, f"{prefix}{key}.")
        elif value is not None:  # null is the same as no key
            found.append((prefix + str(key), value))
    return found


def _as_yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
