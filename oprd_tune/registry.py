"""Our recipes and configs, for torchtune's own command line.

A config belongs to the recipe that its `recipe:` key names. Paths are absolute: torchtune joins them to its own recipe
folder, and an absolute path wins there.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

_SHIPPED = Path(__file__).parent / "_shipped"  # in a wheel; an editable install finds them in the checkout
_ROOT = _SHIPPED if _SHIPPED.is_dir() else Path(__file__).parents[1]
_RECIPE_KEY = re.compile(r"^recipe:\s*(\w+)", re.MULTILINE)


def recipe_files() -> dict[str, Path]:
    """Our recipes by name."""
    return {path.stem: path for path in sorted((_ROOT / "recipes").glob("*.py"))}


def config_files() -> dict[str, Path]:
    """Our configs by the name that `--config` takes, such as `tiny/oprd`."""
    folder = _ROOT / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def recipe_named_in(config: Path) -> str | None:
    """The value of a config file's `recipe:` key."""
    match = _RECIPE_KEY.search(config.read_text())
    return match[1] if match else None


def register(registry: ModuleType) -> None:
    """Append our recipes to torchtune's registry module, unless they are there already."""
    known = {recipe.name for recipe in registry._ALL_RECIPES}
    owners = {name: recipe_named_in(path) for name, path in config_files().items()}
    for recipe, path in recipe_files().items():
        if recipe in known:
            continue
        configs = [
            registry.Config(name=name, file_path=str(config_files()[name]))
            for name, owner in owners.items()
            if owner == recipe
        ]
        registry._ALL_RECIPES.append(
            registry.Recipe(
                name=recipe,
                file_path=str(path),
                configs=configs,
                supports_distributed=recipe.endswith("_distributed"),
            )
        )


def owner_of_running_config() -> str | None:
    """The recipe, torchtune's or ours, that the config on this process's command line is shipped with, if any."""
    if "--config" not in sys.argv[:-1]:
        return None
    import torchtune
    from torchtune._recipe_registry import get_all_recipes

    running = Path(sys.argv[sys.argv.index("--config") + 1]).resolve()
    folder = Path(torchtune.__file__).parent.parent / "recipes" / "configs"
    for recipe in get_all_recipes():
        if any((folder / config.file_path).resolve() == running for config in recipe.configs):
            return recipe.name
    return None
