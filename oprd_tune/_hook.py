"""How torchtune's command line learns of our recipes, without a change to torchtune.

`oprd_tune.pth`, one line that runs at interpreter start, puts a finder in front of Python's own. It imports nothing and
answers for one module only, torchtune's recipe registry; then it leaves, and this file takes over.
`OPRD_TUNE_NO_HOOK=1` switches it off.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def registry_spec(path: Sequence[str] | None) -> ModuleSpec | None:
    """The registry module's own spec, with our registration after its execution.

    Args:
        path: where torchtune's modules are.
    """
    spec = PathFinder.find_spec("torchtune._recipe_registry", path)
    if spec is None or spec.loader is None or os.environ.get("OPRD_TUNE_NO_HOOK"):
        return spec
    execute = spec.loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        from oprd_tune.registry import register

        register(module)

    spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
    return spec
