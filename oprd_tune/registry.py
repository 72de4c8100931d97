"""Our recipes and configs, for torchtune's own command line. A config's `recipe:` key names the recipe it belongs to.

Paths are absolute: torchtune joins them to its own recipe folder, and an absolute path wins there.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

_SHIPPED = Path(__file__).parent / "_shipped"  # exists in a wheel; an editable install reads from the checkout
_ROOT = _SHIPPED if _SHIPPED.is_dir() else Path(__file__).parents[1]
# A recipe runs on any number of devices. Called by one of these names, it uses one device even if there are more.
FURTHER_NAMES = {"oprd_single_device": "oprd_distributed", "opd_topk_single_device": "opd_topk_distributed"}
_RECIPE_KEY = re.compile(r"^recipe:\s*(\w+)", re.MULTILINE)


def recipe_files() -> dict[str, Path]:
    """Our recipes by name, further names included."""
    files = {path.stem: path for path in sorted((_ROOT / "recipes").glob("*.py"))}
    return files | {name: files[recipe] for name, recipe in FURTHER_NAMES.items()}


def full_name(recipe: str) -> str:
    """The name of a recipe's file. Any other word is returned unchanged."""
    return FURTHER_NAMES.get(recipe, recipe)


def asked_for_one_process() -> bool:
    """Whether this process's command line calls a recipe by one of its `…_single_device` names."""
    return any(word in FURTHER_NAMES for word in sys.orig_argv)


def config_files() -> dict[str, Path]:
    """Our configs, by the name that `--config` takes, such as `tiny/oprd`."""
    folder = _ROOT / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def recipe_named_in(config: Path) -> str | None:
    """The value of a config file's `recipe:` key; None if it has none."""
    match = _RECIPE_KEY.search(config.read_text())
    return match[1] if match else None


def register(registry: ModuleType, file: tuple[str, str] | None = None) -> None:
    """Append our recipes to torchtune's registry module, unless it already lists them.

    `file` is one more recipe: the path by which a user calls it, and the path by which it runs.
    """
    known = {recipe.name for recipe in registry._ALL_RECIPES}
    for recipe, path in recipe_files().items():
        if recipe in known:
            continue
        configs = [
            registry.Config(name=name, file_path=str(file))
            for name, file in config_files().items()
            if full_name(recipe_named_in(file) or "") == full_name(recipe)
        ]
        registry._ALL_RECIPES.append(
            registry.Recipe(name=recipe, file_path=str(path), configs=configs, supports_distributed=True)
        )
    if file is not None and file[0] not in known:
        registry._ALL_RECIPES.append(registry.Recipe(file[0], file[1], configs=[], supports_distributed=True))
