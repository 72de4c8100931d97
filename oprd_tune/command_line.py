"""What `tune` is asked for, looked at before anything heavy is imported: mistakes in a command, and `tune ls`.

A command that has nothing to do with our recipes is left to torchtune.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from oprd_tune.errors import ConfigError, nearest
from oprd_tune.registry import config_files, full_name, recipe_files, recipe_named_in, register

_CONFIG = Path(__file__).parent / "config"
# Where a recipe's keys are defined: a file, and its dataclasses.
_KEYS = {"settings.py": ("OPRDSettings", "EvalSettings"), "parts.py": ("EngineParts", "Parts", "EvalParts")}
_SHORT_FORM = ("student", "teacher", "lora", "recipe")


def look_at(words: list[str]) -> None:
    """Check the words after `tune`; list recipes if they ask for that. May change them, see `_with_folder`.

    Raises:
        SystemExit: if nothing is left to do, with status 2 after a mistake, which is then printed.
    """
    if words == ["ls"]:
        _list()
        sys.exit(0)
    if words[:1] != ["run"] or {"-h", "--help"} & set(words):
        return
    try:
        _check_run(words)
    except ConfigError as error:
        sys.exit(_told(error))


def _told(error: ConfigError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def torchtunes_registry() -> ModuleType:
    """torchtune's list of recipes with ours in it, without an import of torchtune, which takes seconds."""
    found = PathFinder.find_spec("torchtune")  # past our own finder, which calls this
    if found is None or not found.submodule_search_locations:
        raise ConfigError("torchtune is not installed")
    file = Path(next(iter(found.submodule_search_locations))) / "_recipe_registry.py"
    spec = spec_from_file_location("_torchtunes_recipe_registry", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    register(module)
    return module


def _list() -> None:
    """As torchtune's own `tune ls` does."""
    print(f"{'RECIPE':<40} {'CONFIG':<40}")
    for recipe in torchtunes_registry().get_all_recipes():
        configs = [config.name for config in recipe.configs] or ["<>"]
        for i, config in enumerate(configs):
            print(f"{'' if i else recipe.name:<40} {config:<40}")


@dataclass
class _Command:
    """A `tune run`, taken apart.

    Attributes:
        place: the place of the recipe among the words; None if there is none.
        recipe: its name or path.
        config: the word after `--config`; None if there is none.
        overrides: words after the recipe that are neither.
    """

    place: int | None
    recipe: str
    config: str | None
    overrides: list[str]


def _taken_apart(words: Sequence[str]) -> _Command:
    """The recipe is the word that is one, or else the one before `--config`, since torchrun's options have values."""
    known = {*recipe_files(), *(recipe.name for recipe in torchtunes_registry().get_all_recipes())}
    end = words.index("--config") if "--config" in words else len(words)
    places = [i for i, word in enumerate(words[1:end], start=1) if word in known or word.endswith(".py")]
    if not places and end > 1 and "=" not in words[end - 1] and words[end - 1][0] != "-":
        places = [end - 1]
    place = places[0] if places else None
    config = words[end + 1] if end + 1 < len(words) else None
    rest = [word for i, word in enumerate(words) if i > (place or 0) and i not in (end, end + 1)]
    return _Command(place, "" if place is None else words[place], config, rest)


def _check_run(words: list[str]) -> None:
    command = _taken_apart(words)
    recipes = [recipe.name for recipe in torchtunes_registry().get_all_recipes()]
    if command.place is None:
        raise ConfigError("the recipe is missing: tune run oprd_distributed --config tiny/oprd; `tune ls` lists all")
    if command.recipe.endswith(".py"):
        _with_folder(words, command)
    elif command.recipe not in recipes:
        if find_spec(command.recipe.partition(".")[0]) is None and not Path(command.recipe).exists():
            raise ConfigError(f"there is no recipe {command.recipe!r}{nearest(command.recipe, recipes)}")
        return
    elif command.recipe not in recipe_files():
        return  # torchtune's own
    _check_config(command)
    for word in command.overrides:
        if word.startswith("--"):
            name = word.lstrip("-").partition("=")[0]
            raise ConfigError(f"{word} is no option; settings are written without dashes: {name}=VALUE")
    if command.recipe in recipe_files():
        _check_keys(command)


def _with_folder(words: list[str], command: _Command) -> None:
    """Let a recipe's file lie anywhere: torchtune makes a module's name of it, which has to be found."""
    path = Path(command.recipe)
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; `tune cp oprd_distributed {path}` makes one to edit")
    if path.parent == Path() or command.place is None:
        return
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))  # of ranks too
    words[command.place] = path.name


def _check_config(command: _Command) -> None:
    of_recipe = {name for name, file in config_files().items() if _belongs(file, command.recipe)}
    ours = sorted(of_recipe or config_files(), key=lambda name: not name.startswith("tiny/"))  # which run anywhere
    if command.config is None:
        raise ConfigError(
            f"--config is missing: tune run {command.recipe} --config {ours[0]}; it takes a config that `tune ls` "
            "lists, or a file of yours"
        )
    known = {config.name for recipe in torchtunes_registry().get_all_recipes() for config in recipe.configs}
    if command.config not in known and not Path(command.config).is_file():
        raise ConfigError(f"there is no config {command.config!r}, nor such a file{nearest(command.config, ours)}")


def _belongs(config: Path, recipe: str) -> bool:
    return full_name(recipe_named_in(config) or "") == full_name(recipe)


def _check_keys(command: _Command) -> None:
    """Whether each override belongs to a key that there is. What lies below a key is checked later."""
    content = _content(config_files().get(str(command.config)) or Path(str(command.config)))
    known = {*content, *_SHORT_FORM, *(name for file, classes in _KEYS.items() for name in _fields(file, classes))}
    for word in command.overrides:
        name, equals, _ = word.partition("=")
        key = name.lstrip("~").partition(".")[0]
        if not equals and not name.startswith("~"):
            raise ConfigError(f"{word!r} is no setting; write key=value")
        if key not in known:
            inner = [f"{section}.{key}" for section, values in content.items() if key in (values or ())]
            hint = f"; did you mean {inner[0]!r}?" if inner else nearest(key, known)
            raise ConfigError(f"unknown config key {key!r}{hint}")


def _content(file: Path) -> dict[str, Any]:
    """A config's sections; a key's value is a mapping, or of no interest here. Empty if it cannot be read."""
    import yaml

    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    items = found.items() if isinstance(found, dict) else ()
    return {str(key): value if isinstance(value, dict) else None for key, value in items}


def _fields(file: str, classes: Sequence[str]) -> list[str]:
    """The annotated names of some classes in a file of this package, which is not imported."""
    tree = ast.parse((_CONFIG / file).read_text())
    bodies = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name in classes]
    lines = [line for body in bodies for line in body if isinstance(line, ast.AnnAssign)]
    return [line.target.id for line in lines if isinstance(line.target, ast.Name)]
