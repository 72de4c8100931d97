"""What `tune` is asked for, looked at before anything heavy is imported: mistakes in a command, and `tune ls`.

A command that has nothing to do with our recipes is left to torchtune.
"""

from __future__ import annotations

import ast
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from oprd_tune.errors import ConfigError, nearest
from oprd_tune.failed_ranks import is_ours
from oprd_tune.registry import config_files, full_name, recipe_files, recipe_named_in, register

_CONFIG = Path(__file__).parent / "config"
# Where a recipe's keys are defined: a file, and its dataclasses.
_SCALARS = "settings.py"
_KEYS = {_SCALARS: ("OPRDSettings", "EvalSettings"), "parts.py": ("EngineParts", "Parts", "EvalParts")}
# Options of torchrun's that take no value, with underscores.
_WITHOUT_VALUE = ("__standalone", "_m", "__module", "__no_python", "__run_path", "__virtual_local_rank")
_SHORT_FORM = ("student", "teacher", "lora", "recipe")


def look_at(words: Sequence[str]) -> None:
    """Check the words after `tune`; list recipes if they ask for that. What is not surely a mistake is left alone.

    Raises:
        SystemExit: if nothing is left to do, with status 2 after a mistake, which is then printed.
    """
    try:
        if list(words) == ["ls"]:
            _list()
            sys.exit(0)
        if words[:1] == ["run"] and not {"-h", "--help"} & set(words):
            _check_run(words[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception:  # whatever it is, torchtune sees the same command, and says so
        return


def torchtunes_registry() -> ModuleType:
    """torchtune's list of recipes with ours in it, without an import of torchtune, which takes seconds."""
    found = PathFinder.find_spec("torchtune")  # past our own finder, which calls this
    assert found is not None
    assert found.submodule_search_locations
    file = Path(next(iter(found.submodule_search_locations))) / "_recipe_registry.py"
    module = _module_at("_torchtunes_recipe_registry", file)
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
        recipe: its name or path.
        config: the word after `--config`; None if there is none.
        overrides: words after the recipe that are neither.
    """

    recipe: str
    config: str | None
    overrides: list[str]


def _taken_apart(words: Sequence[str]) -> _Command | None:
    """The recipe is the first word that is neither an option of torchrun's nor its value; None if there is none."""
    place = 0
    while place < len(words) and words[place].startswith("-"):
        place += 1 if "=" in words[place] or words[place].replace("-", "_") in _WITHOUT_VALUE else 2
    if place >= len(words):
        return None
    rest = list(words[place + 1 :])
    config = None
    if "--config" in rest:
        at = rest.index("--config")
        config = rest[at + 1] if at + 1 < len(rest) else None
        del rest[at : at + 2]
    return _Command(words[place], config, rest)


def _check_run(words: Sequence[str]) -> None:
    if not words:
        raise ConfigError("the recipe is missing: tune run oprd_distributed --config tiny/oprd; `tune ls` lists all")
    command = _taken_apart(words)
    if command is None:
        return
    ours = command.recipe in recipe_files()
    if not ours and command.recipe.endswith(".py"):
        if not os.path.exists(command.recipe):
            raise ConfigError(
                f"there is no file {command.recipe}; `tune cp oprd_distributed {command.recipe}` makes one to edit"
            )
        ours = is_ours(Path(command.recipe))
    elif not ours:
        _check_recipe(command.recipe)
    if not ours:
        return
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of C++ extensions that it skips, at every start
    _check_config(command)
    for word in command.overrides:
        if word.startswith("--"):
            name = word.lstrip("-").partition("=")[0]
            raise ConfigError(f"{word} is no option; settings are written without dashes: {name}=VALUE")
    if command.recipe in recipe_files():
        _check_keys(command)


def _check_recipe(word: str) -> None:
    """Raise ConfigError for a bare word that is no recipe of torchtune's or ours, no module and no file."""
    if not word.isidentifier() or Path(word).exists() or Path(f"{word}.py").exists():
        return
    known = [recipe.name for recipe in torchtunes_registry().get_all_recipes()]
    if word not in known and find_spec(word) is None:
        raise ConfigError(f"there is no recipe {word!r}{nearest(word, known)}")


def file_to_register(words: Sequence[str]) -> tuple[str, str] | None:
    """A recipe's file that torchtune cannot run, and its whole path, by which it can; None for any other.

    torchtune makes a module's name of a path. It cannot import one with `..` or a leading `./`, an absolute one, or one
    whose first folder is the name of a package, such as its own `recipes`.
    """
    command = _taken_apart(words[1:]) if words[:1] == ["run"] else None
    if command is None or not command.recipe.endswith(".py") or not os.path.isfile(command.recipe):
        return None
    parts = command.recipe.removesuffix(".py").split("/")
    importable = all(part.isidentifier() for part in parts)
    if importable and (len(parts) == 1 or find_spec(parts[0]) is None):
        return None
    return command.recipe, os.path.abspath(command.recipe)


def _check_config(command: _Command) -> None:
    of_recipe = {name for name, file in config_files().items() if _belongs(file, command.recipe)}
    ours = sorted(of_recipe or config_files(), key=lambda name: not name.startswith("tiny/"))  # which run anywhere
    if command.config is None:
        joined = next((word for word in command.overrides if word.startswith("--config=")), None)
        if joined is not None:
            raise ConfigError(f"write it as two words: --config {joined.partition('=')[2]}")
        raise ConfigError(
            f"--config is missing: tune run {command.recipe} --config {ours[0]}; it takes a config that `tune ls` "
            "lists, or a file of yours"
        )
    known = {config.name for recipe in torchtunes_registry().get_all_recipes() for config in recipe.configs}
    if command.config not in known and not os.path.exists(command.config):
        here = [file.name for file in Path().glob("*.y*ml")]
        hint = nearest(command.config, [*ours, *here])
        raise ConfigError(f"there is no config {command.config!r}, nor such a file{hint}")
    if command.config not in known:
        _check_yaml(command.config)


def _check_yaml(file: str) -> None:
    """Raise ConfigError, with line and column, for a file that is no YAML."""
    import yaml

    if not os.path.isfile(file):
        return
    try:
        yaml.safe_load(Path(file).read_text())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"{file}{place}: {error.problem}; this is no YAML") from error


def _belongs(config: Path, recipe: str) -> bool:
    return full_name(recipe_named_in(config) or "") == full_name(recipe)


def _check_keys(command: _Command) -> None:
    """Whether each key is one that there is, and each scalar of its type. What lies below a key is checked later."""
    file = config_files().get(str(command.config)) or Path(str(command.config))
    content, hints = _content(file), _hints()
    known = {*_SHORT_FORM, *hints}
    for key, value in content.items():
        if key not in known:
            raise ConfigError(f"{file.name}: unknown config key {key!r}{nearest(key, known)}")
        _check_type(key, value, hints)
    for word in command.overrides:
        name, equals, _ = word.partition("=")
        key = re.split(r"[.\[]", name.lstrip("~"), maxsplit=1)[0]
        if not equals and not name.startswith("~"):
            raise ConfigError(f"{word!r} is no setting; write key=value")
        if key not in known:
            sections = [(section, values) for section, values in content.items() if isinstance(values, dict)]
            inner = [f"{section}.{key}" for section, values in sections if key in values]
            hint = f"; did you mean {inner[0]!r}?" if inner else nearest(key, known)
            raise ConfigError(f"unknown config key {key!r}{hint}")
        if word.count("=") > 1:
            raise ConfigError(
                f"{word} has more than one `=`, which torchtune cannot read here; `tune cp` the config, and write "
                f"{name} into the copy"
            )
        if name.startswith("~") and content:
            _check_removal(name[1:], content)
        if equals:
            value = _value_in(word)
            if name == key:
                _check_type(key, value, hints)


def _check_removal(path: str, content: Mapping[str, Any]) -> None:
    """Raise ConfigError for `~path` if there is nothing to take away, or something that torchtune does not."""
    found: Any = content
    for key in path.split("."):
        if isinstance(found, str) and "${" in found:
            return
        if not isinstance(found, Mapping) or key not in found:
            raise ConfigError(f"~{path} takes away a key that the config does not have; leave it out")
        found = found[key]
    if isinstance(found, Mapping) and "_component_" in found:
        raise ConfigError(
            f"~{path} is a section with a `_component_`, which the command line cannot take away; give {path}=null, or "
            "`tune cp` the config and take the section out of the copy"
        )


def _check_type(key: str, value: Any, hints: Mapping[str, Any]) -> None:
    """Raise ConfigError if a scalar of a recipe is of another type than its own. Others, and references, are left."""
    if hints.get(key) is not None and "${" not in str(value) and value != "???":
        _module_of_config("checks").typed(key, value, hints[key])


def _value_in(word: str) -> Any:
    """The value of `key=value`, as torchtune reads it. Raises ConfigError for one that cannot be read."""
    import yaml
    from omegaconf import OmegaConf

    try:
        (value,) = OmegaConf.to_container(OmegaConf.from_dotlist([word]), resolve=False).values()
    except yaml.YAMLError as error:
        key, _, text = word.partition("=")
        raise ConfigError(
            f"{word} is no YAML; a text with braces or colons needs two pairs of quotes: {key}=\"'{text}'\""
        ) from error
    return value


def _content(file: Path) -> dict[str, Any]:
    """A config's keys and plain values. Empty if it cannot be read, which is told later."""
    from omegaconf import OmegaConf

    try:
        found = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except Exception:
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _hints() -> dict[str, Any]:
    """The keys of all recipes. Scalars come with their type; components with None."""
    found: dict[str, Any] = {}
    for file, classes in _KEYS.items():
        tree = ast.parse((_CONFIG / file).read_text())
        for node in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in classes):
            for line in (line for line in node.body if isinstance(line, ast.AnnAssign)):
                assert isinstance(line.target, ast.Name)
                plain = file == _SCALARS  # our own file, which is not imported
                found[line.target.id] = eval(ast.unparse(line.annotation), {"Any": Any}) if plain else None
    return found


def _module_of_config(name: str) -> ModuleType:
    """A file of the package `oprd_tune.config` without that package, whose import takes seconds."""
    return _module_at(f"_oprd_tune_config_{name}", _CONFIG / f"{name}.py")


def _module_at(name: str, file: Path) -> ModuleType:
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
