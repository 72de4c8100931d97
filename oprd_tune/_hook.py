"""Adds our recipes to torchtune's command line, without a change to torchtune.

`oprd_tune.pth` holds one line, which runs when the interpreter starts. It puts a finder in front of Python's own. The
finder imports nothing. When `tune` imports torchtune, which takes seconds, it first calls this file, so that mistakes
in the command are told at once. It answers for one module: torchtune's recipe registry. Then it removes itself and
calls this file again, which also lets a job of several ranks end in one line. `OPRD_TUNE_NO_HOOK=1` switches it off.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_looked: list[str] = []  # the command, once it was looked at: the finder asks whenever something looks for torchtune


def before_torchtune() -> None:
    """Look at the command if this process is `tune`."""
    if _looked or os.path.basename(sys.argv[0]) != "tune" or os.environ.get("OPRD_TUNE_NO_HOOK"):
        return
    _looked.extend(sys.argv)
    from oprd_tune.command_line import look_at

    look_at(sys.argv[1:])


def registry_spec(path: Sequence[str] | None) -> ModuleSpec | None:
    """The registry module's own spec, extended: after the module has run, our recipes are registered in it."""
    spec = PathFinder.find_spec("torchtune._recipe_registry", path)
    if spec is None or spec.loader is None or os.environ.get("OPRD_TUNE_NO_HOOK"):
        return spec
    execute = spec.loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        from oprd_tune.command_line import file_to_register
        from oprd_tune.failed_ranks import end_quietly
        from oprd_tune.registry import register

        register(module, file_to_register(sys.argv[1:]))
        end_quietly(sys.argv[1:])

    spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
    return spec
