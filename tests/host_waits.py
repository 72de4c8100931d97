"""Notes what would make the host wait for a GPU, on a machine without one."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their results, or the sizes of them, depend on what tensors hold. A scalar that is read is `_local_scalar_dense`.
_READ = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique_consecutive", "_unique2", "equal"}
_INDEXED = {"index", "index_put_", "_index_put_impl_"}


class _Watch(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, tensors = func.overloadpacket.__name__, [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        by_mask = name in _INDEXED and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None)
        if name in _READ or by_mask:
            self._found.append(f"{name} at {_place()}")
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and any(x.device != result.device for x in tensors):
            self._found.append(f"a copy between devices at {_place()}")
        return result


def _place() -> str:
    """The innermost line of ours."""
    ours = [x for x in traceback.extract_stack() if "oprd_tune" in x.filename or "recipe" in x.filename]
    return f"{ours[-1].filename}:{ours[-1].lineno}" if ours else "?"


@contextmanager
def noted_host_waits() -> Iterator[list[str]]:
    """Collects what reads a tensor's values on the host within the scope, or makes a tensor of the host's values.

    Tensors may be on the meta device, where reading fails at once, or on a CPU.
    """
    found: list[str] = []

    def noting(function, name, when=lambda arguments: True):
        def noted(*args, **kwargs):
            if when(kwargs):
                found.append(f"{name} at {_place()}")
            return function(*args, **kwargs)

        return noted

    with ExitStack() as scope:
        for name in ("tolist", "numpy"):
            scope.enter_context(mock.patch.object(Tensor, name, noting(getattr(Tensor, name), name)))
        for name in ("tensor", "as_tensor"):
            made = noting(getattr(torch, name), name, when=lambda arguments: arguments.get("device") is not None)
            scope.enter_context(mock.patch.object(torch, name, made))
        scope.enter_context(_Watch(found))
        yield found
