"""Quantises the linear layers of a frozen teacher: to torchao's tensors, or to plain int8 tensors that FSDP2 can shard.

Only this file imports torchao. It does so inside functions, because the import is slow and prints a line.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oprd_tune.errors import ConfigError


@dataclass(frozen=True)
class Scheme:
    """A torchao config with its arguments and its requirements.

    Attributes:
        bits: bits per weight, including the scales of groups.
        row_bytes: the most bytes of an output row's scale and zero point.
        multiple: the number of columns has to be a multiple of this.
        tile: a weight is padded to multiples of these numbers of rows and columns.
        dtype: the only dtype that the kernel takes; None if it takes any.
    """

    config: str
    arguments: Mapping[str, Any]
    bits: float
    row_bytes: int = 0
    multiple: int = 1
    tile: tuple[int, int] = (1, 1)
    dtype: torch.dtype | None = None


# The int8 configs are version 1 and int4 uses hqq: the alternatives keep scales above the dtype's epsilon (0.0078 for
# bf16). Most rows of a language model need a far smaller scale, or their weights are rounded to a few steps.
# The kernel of int8_dynamic needs multiples of 8, and torchao skips 16. torch has a kernel for this int4 layout only.
_INT4 = {"int4_packing_format": "tile_packed_to_4d", "int4_choose_qparams_algorithm": "hqq", "group_size": 64}
SCHEMES: Mapping[str, Scheme] = {
    "int8_weight_only": Scheme("Int8WeightOnlyConfig", {"version": 1}, 8, row_bytes=12),
    "int8_dynamic": Scheme("Int8DynamicActivationInt8WeightConfig", {"version": 1}, 8, row_bytes=4, multiple=32),
    "float8_weight_only": Scheme("Float8WeightOnlyConfig", {"version": 2}, 8, row_bytes=4),
    "int4_weight_only": Scheme(
        "Int4WeightOnlyConfig", {"version": 2, **_INT4}, 4.5, multiple=64, tile=(8, 1024), dtype=torch.bfloat16
    ),
}
_SHARDABLE = "int8_weight_only"


class Int8Linear(nn.Module):
    """y = s · (W x) + b with int8 weights W [out, in] and a scale s [out] for each row, all frozen.

    The product is computed in x's dtype, which represents int8 exactly, and then scaled. W and s are plain parameters,
    so `fully_shard` shards both by rows.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """W = round(w / s) with s = max|w| / 127 for each row. s is rounded to w's dtype first, so W allows for it."""
        weight = linear.weight.detach()
        smallest = torch.finfo(weight.dtype).tiny  # for a row of zeros
        scale = (weight.abs().amax(1) / 127).clamp_min(smallest)
        rounded = (weight.float() / scale.float().unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
        return cls(rounded, scale, None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in x's dtype."""
        y = F.linear(x, self.weight.to(x.dtype)).mul_(self.scale)
        return y if self.bias is None else y.add_(self.bias)


def check_scheme(scheme: str, device: torch.device, *, sharded: bool) -> None:
    """Try a scheme on one small linear layer in bf16, before any weights are read. The random state does not change.

    Raises ConfigError if the scheme is unknown, cannot be sharded, or does not run on the device.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"teacher_quantization={scheme} is unknown; allowed: null, {', '.join(SCHEMES)}")
    if sharded and scheme != _SHARDABLE:
        raise ConfigError(
            f"teacher_quantization={scheme}: torchao's tensors cannot be sharded; allowed: {_SHARDABLE}, or "
            "teacher_placement=replicated"
        )
    try:
        linear = nn.utils.skip_init(nn.Linear, 256, 256, dtype=torch.bfloat16, device=device)
        nn.init.ones_(linear.weight)
        block = nn.Sequential(linear)
        quantize_linears(block, scheme, sharded=sharded)
        block(torch.ones(32, 256, dtype=torch.bfloat16, device=device))
    except Exception as error:  # torchao and its kernels raise all kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        others = ", ".join(name for name in SCHEMES if name != scheme)
        raise ConfigError(
            f"teacher_quantization={scheme} does not run on {device} here ({reason}); choose null or one of {others}"
        ) from error


def quantize_linears(block: nn.Module, scheme: str, *, sharded: bool) -> None:
    """Freeze a loaded block and quantise its linear layers, in place and on their device.

    Experts that lie in one tensor together, as transformers has them, are no linear layers and stay as they are.

    Args:
        scheme: a key of `SCHEMES` that `check_scheme` has passed.
        sharded: whether to replace them by `Int8Linear`s, for FSDP2.

    Raises:
        ConfigError: if a layer's shape or dtype does not fit the scheme.
    """
    block.requires_grad_(False)
    linears = _linears(block)
    for linear in linears.values():
        _check_fit(scheme, linear.weight.shape, linear.weight.dtype)
    if sharded:
        assert scheme == _SHARDABLE, scheme
        for name, linear in linears.items():
            block.set_submodule(name, Int8Linear.from_linear(linear))
        return
    from torchao import quantization

    # By default torchao would also switch the whole process to TF32.
    config = getattr(quantization, SCHEMES[scheme].config)(**SCHEMES[scheme].arguments, set_inductor_config=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Config Deprecation")  # the pinned torchao has version 1
        quantization.quantize_(block, config)


def quantized_bytes(block: nn.Module, scheme: str | None, dtype: torch.dtype) -> int:
    """Bytes of a block's parameters after quantisation. Never too few, at most 10 too many per row of a linear layer.

    Args:
        block: not yet quantised; may be on the meta device. Its buffers are not counted.
        scheme: a key of `SCHEMES`, or None.
        dtype: the dtype of everything that is not quantised.

    Raises:
        ConfigError: if a layer's shape, or the dtype, does not fit the scheme.
    """
    total = sum(parameter.numel() for parameter in block.parameters()) * dtype.itemsize
    if scheme is None:
        return total
    chosen = SCHEMES[scheme]
    for linear in _linears(block).values():
        shape = linear.weight.shape
        _check_fit(scheme, shape, dtype)
        rows, columns = (math.ceil(size / tile) * tile for size, tile in zip(shape, chosen.tile, strict=True))
        total += int(rows * columns * chosen.bits / 8) + rows * chosen.row_bytes - shape.numel() * dtype.itemsize
    return total


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    if not linears:
        raise ConfigError(
            f"teacher_quantization: a block of the teacher, {type(block).__name__}, has no linear layer; leave it out"
        )
    return linears


def _check_fit(scheme: str, shape: torch.Size, dtype: torch.dtype) -> None:
    chosen = SCHEMES[scheme]
    if shape[1] % chosen.multiple or dtype != (chosen.dtype or dtype):
        raise ConfigError(
            f"teacher_quantization={scheme} takes {chosen.dtype or 'any dtype'} and columns in multiples of "
            f"{chosen.multiple}; the teacher has a linear with {shape[1]} columns in {dtype}. Choose {_SHARDABLE}, "
            "which takes all"
        )
