"""The section `teachers`: several teachers by name, and what each of them has of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oprd_tune.config.components import Component
from oprd_tune.data.tokenizer_files import conventions
from oprd_tune.errors import ConfigError, nearest

# What an entry may say. It counts in the place of the same key of the config. `prompts` is an entry's alone.
COMPONENTS = ("teacher_model", "teacher_checkpointer", "teacher_tokenizer", "reader", "bridge")
SCALARS = (
    *("layer_pairs", "min_matched_share", "evaluate_teacher"),
    *("teacher_placement", "teacher_quantization", "teacher_weights"),
)
ALONE = ("teacher", "teacher_model", "teacher_checkpointer", "teacher_tokenizer", "reader")  # not beside `teachers`
PROMPTS = "prompts"
ONLY_TEACHER = "teacher"  # its name where a config has one
Values = dict[str, Any]


@dataclass(frozen=True)
class TeacherEntry:
    """One of several teachers.

    Attributes:
        components: the sections that it has itself, by config key.
        scalars: plain values that it has itself, by config key, not yet checked.
        prompts: what the data set's `teacher_column` says of prompts that it reads.
        record: the entry as plain values.
    """

    components: Mapping[str, Component]
    scalars: Mapping[str, Any]
    prompts: tuple[str, ...]
    record: Mapping[str, Any]

    @classmethod
    def find_all(cls, name: str, sections: Mapping[str, Mapping[str, Any]]) -> dict[str, TeacherEntry]:
        """The entries of a section that `expand_teachers` has written out; `name` is its key."""
        found = {}
        for teacher, entry in sections.items():
            where = f"{name}.{teacher}"
            components = {key: Component.find(f"{where}.{key}", entry[key]) for key in COMPONENTS if key in entry}
            scalars = {key: entry[key] for key in SCALARS if key in entry}
            found[teacher] = cls(components, scalars, tuple(entry[PROMPTS]), entry)
        return found


def expand_teachers(values: Mapping[str, Any], expand: Callable[[Mapping[str, Any]], Values]) -> Values:
    """Write the short form of a config with several teachers out.

    Each teacher's entry is expanded as a config with this teacher alone. The tokenizer is that of the teachers that
    share the student's tokens, or the student's own if there is none.

    Args:
        expand: expands a config with one teacher.

    Raises:
        ConfigError: if an entry cannot be, or if the config also has a teacher beside them.
    """
    shared = {key: value for key, value in values.items() if key != "teachers"}
    shared = {key: value for key, value in shared.items() if value is not None or key not in ALONE}
    if beside := [key for key in ALONE if key in shared]:
        raise ConfigError(
            f"{beside[0]} has no effect beside `teachers`; leave it out, or give it in an entry of `teachers`"
        )
    entries = {str(name): _checked(str(name), entry) for name, entry in values["teachers"].items()}
    expanded = {}
    for name, entry in entries.items():
        own = {key: value for key, value in entry.items() if key != PROMPTS}
        try:
            expanded[name] = expand({**shared, **{key: _over(shared.get(key), value) for key, value in own.items()}})
        except ConfigError as error:
            raise ConfigError(f"teachers.{name}: {error}") from error
        if any(expanded[name].get(key) is None for key in ("teacher_model", "teacher_checkpointer")):
            raise ConfigError(f"teachers.{name} lacks `teacher`, a model folder or a hub name")
    sharing = {name: one for name, one in expanded.items() if one.get("teacher_tokenizer") is None}
    if "tokenizer" not in shared:
        _check_alike(sharing)
    found = dict(next(iter((sharing or expanded).values())))
    for key in (*COMPONENTS, *SCALARS):
        found.pop(key, None)
    found |= {key: shared[key] for key in SCALARS if key in shared}
    found["teachers"] = {
        name: {key: one[key] for key in COMPONENTS if one.get(key) is not None}
        | {key: entries[name][key] for key in SCALARS if key in entries[name]}
        | {PROMPTS: [str(value) for value in entries[name].get(PROMPTS, [name])]}
        for name, one in expanded.items()
    }
    return found


def _check_alike(sharing: Mapping[str, Values]) -> None:
    """Raise ConfigError if teachers of one tokenizer would write prompts, or end responses, each in another way."""
    own = {name: conventions(Path(one["teacher_model"].get("path", ""))) for name, one in sharing.items()}
    known = {name: (found["chat template"], found["EOS"]) for name, found in own.items() if found is not None}
    for name, found in known.items():
        first = next(iter(known))
        if found != known[first]:
            raise ConfigError(
                f"teachers.{first} and teachers.{name} have the same tokens, but another chat template or EOS; give "
                "`tokenizer`, the folder whose template writes the prompts and whose stop tokens end the responses"
            )


def _over(shared: object, own: object) -> object:
    """An entry's value. A section without a `_component_` adds to the one that the config has under the same key."""
    if isinstance(shared, Mapping) and isinstance(own, Mapping) and "_component_" not in own:
        return {**shared, **own}
    return own


def _checked(name: str, entry: object) -> Mapping[str, Any]:
    """An entry as a mapping. Raises ConfigError for a wrong name, an unknown key or prompts that are no words."""
    where = f"teachers.{name}"
    if not name.replace("_", "").isalnum():
        raise ConfigError(f"teachers has the name {name!r}; allowed are letters, digits and _")
    if name == ONLY_TEACHER:
        raise ConfigError(f"teachers has the name {name!r}, which stands for one that is alone; give it another")
    if isinstance(entry, str):
        return {"teacher": entry}
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} is {entry!r}; give a model folder, a hub name, or a section with `teacher`")
    known = {"teacher", *COMPONENTS, *SCALARS, PROMPTS}
    for key in entry:
        if key == "teacher_prompt_template":
            raise ConfigError(
                f"{where} has no {key}: it belongs to `dataset` and counts for all teachers; a column in its braces, "
                "which may hold a whole prompt, makes it differ by row"
            )
        if key not in known:
            raise ConfigError(f"{where} has no key {key!r}{nearest(str(key), known)}")
    prompts = entry.get(PROMPTS, [name])
    if not isinstance(prompts, list) or not prompts or not all(isinstance(value, (str, int)) for value in prompts):
        raise ConfigError(
            f"{where}.{PROMPTS} is {prompts!r}; give a list of what the data set's teacher_column says, such as "
            f"[{name}]"
        )
    return entry
