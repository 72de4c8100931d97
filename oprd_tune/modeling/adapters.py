"""LoRA and DoRA adapters of torchtune's builders: their parameters, their first values and merged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torchtune.modules.peft import (
    DoRALinear,
    LoRALinear,
    get_adapter_params,
    get_adapter_state_dict,
    get_merged_lora_ckpt,
)

from oprd_tune.errors import ConfigError
from oprd_tune.torchtune_compat import dora_weight_norm, has_quantised_base

_ADAPTED = (LoRALinear, DoRALinear)
_INNER = ".linear"  # suffix of a linear inside a projection, where Hugging Face names only the projection


class _BiasedDoRA(DoRALinear):
    """y = m / ‖W + s B A‖ · (W + s B A) x + b. torchtune also scales b; DoRA, PEFT and merged weights do not."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        if self.disabled:
            return F.linear(x, self.weight, self.bias)
        base, x = F.linear(x, self.weight), self.dropout(x)
        eye = torch.eye(self.in_dim, device=x.device, dtype=x.dtype)
        change = self.lora_b(self.lora_a(eye)).T.detach()  # calls, so that FSDP's hooks run
        norm = dora_weight_norm(self, self.weight.to(x.dtype), change).detach()
        return self.magnitude / norm * (base + self.scaling * self.lora_b(self.lora_a(x))) + self.bias


def plain_name(name: str) -> str:
    """A parameter's name without the wrapper of blocks that are recomputed."""
    return name.replace("_checkpoint_wrapped_module.", "")


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the adapters' parameters in the model's state dict. The set is empty for a model without adapters."""
    return {plain_name(name) for name in get_adapter_params(model)}


def check_adapters(name: str, model: nn.Module) -> None:
    """Raise ConfigError for adapters that cannot be trained here. `name` is the model's config key, for the message."""
    if any(map(has_quantised_base, _adapted(model))):
        raise ConfigError(
            f"{name}.quantize_base is not supported; leave it out (an int8 teacher is: teacher_quantization)"
        )


def start_adapters(module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
    """Move the adapters of a block or model from the meta device to `device` and initialise them in `dtype`.

    The weights that they adapt must be loaded first. B·A is zero at the start, so the model still computes what the
    loaded weights do.
    """
    for linear in _adapted(module):
        for name in linear.adapter_params():
            owner, _, leaf = name.rpartition(".")
            holder = linear.get_submodule(owner)
            old = getattr(holder, leaf)
            new = torch.empty_like(old, device=device, dtype=dtype)
            setattr(holder, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        linear.initialize_parameters()
        if isinstance(linear, DoRALinear):
            linear.initialize_dora_magnitude()
            if linear.bias is not None:
                linear.__class__ = _BiasedDoRA


@contextmanager
def merged_while_gathered(model: nn.Module) -> Iterator[None]:
    """Within the scope, a sharded model has its adapters merged into its weights, so forward passes are cheaper.

    Enter it within `gathered`: gathered weights are copies, so merging does not change the shards. A model that is not
    sharded is left alone, because merging would round the only copy of its weights.
    """
    linears = _adapted(model) if isinstance(model, FSDPModule) else []
    try:
        with torch.no_grad():
            for linear in linears:
                state = {f"x.{name}": p.detach().float() for name, p in linear.named_parameters() if name != "bias"}
                linear.weight.copy_(get_merged_lora_ckpt(state, *_rank_and_alpha(linear))["x.weight"])
                linear.disabled = True
        yield
    finally:
        for linear in linears:
            linear.disabled = False


def merge_adapters(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The full state dict `weights` with the adapters merged in; unchanged for a model without adapters."""
    linears = _adapted(model)
    if not linears:
        return weights
    # torchtune merges in place, so the weights that it changes are copied first.
    names = {plain_name(name) for name, module in model.named_modules() if isinstance(module, _ADAPTED)}
    copies = {f"{name}.weight": weights[f"{name}.weight"].clone() for name in names}
    return get_merged_lora_ckpt(weights | copies, *_rank_and_alpha(linears[0]))


def adapter_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' entries of a state dict, named after the projection that they adapt."""
    return {name.replace(f"{_INNER}.", "."): value for name, value in get_adapter_state_dict(weights).items()}


def adapter_config(model: nn.Module) -> dict[str, Any]:
    """The description of a model's adapters that torchtune's checkpointers write for PEFT."""
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, _ADAPTED)]
    rank, alpha = _rank_and_alpha(named[0][1])
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.removesuffix(_INNER).rpartition(".")[2] for name, _ in named}),
        "peft_type": "LORA",
        "use_dora": isinstance(named[0][1], DoRALinear),
    }


def _adapted(model: nn.Module) -> list[LoRALinear | DoRALinear]:
    return [module for module in model.modules() if isinstance(module, _ADAPTED)]


def _rank_and_alpha(linear: LoRALinear | DoRALinear) -> tuple[int, float]:
    rank = linear.lora_a.out_features
    return rank, linear.scaling * rank if isinstance(linear, DoRALinear) else linear.alpha
