"""Runs at interpreter start, from one `.pth` line: lets torchtune's registry learn of our recipes when it is imported.

Nothing but this file is imported then, and the finder leaves after its one use. `OPRD_TUNE_NO_HOOK=1` switches it off.
"""

import os
import sys

_REGISTRY = "torchtune._recipe_registry"


class _RegistryFinder:
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """Answer for the registry module only: its own spec, with our registration after its execution."""
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run_module = spec.loader.exec_module

            def run_module_then_register(module):  # type: ignore[no-untyped-def]
                run_module(module)
                from oprd_tune.registry import register

                register(module)

            spec.loader.exec_module = run_module_then_register  # type: ignore[method-assign]
        return spec


if not os.environ.get("OPRD_TUNE_NO_HOOK") and _REGISTRY not in sys.modules:
    sys.meta_path.insert(0, _RegistryFinder())
