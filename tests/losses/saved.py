"""What autograd keeps until the backward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass(eq=False)
class _Saved:
    tensor: Tensor


def kept_for_backward(make: Callable[[], Tensor]) -> list[tuple[torch.dtype, int]]:
    """Dtype and size of each tensor that the graph of `make`'s result keeps. Views of one memory count once."""
    saved: WeakSet[_Saved] = WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        holder = _Saved(tensor)
        saved.add(holder)
        return holder

    with saved_tensors_hooks(pack, lambda holder: holder.tensor):
        result = make()
    assert result.requires_grad
    memory = {x.tensor.untyped_storage().data_ptr(): (x.tensor.dtype, x.tensor.untyped_storage()) for x in saved}
    return sorted(
        ((dtype, storage.nbytes() // dtype.itemsize) for dtype, storage in memory.values()), key=lambda kept: str(kept)
    )
