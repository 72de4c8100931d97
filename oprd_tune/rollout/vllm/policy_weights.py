"""The student's weights for an engine that has its own copy: gathered, merged, under Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune.modules.tied_linear import TiedLinear

from oprd_tune.modeling.adapters import adapter_names, merge_adapters, plain_name
from oprd_tune.modeling.families import family_of
from oprd_tune.modeling.output import device_of
from oprd_tune.protocols import Policy
from oprd_tune.torchtune_compat import config_of, folder_of

_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_BY_TOKEN = (_EMBEDDING, _HEAD)  # parameters with one row per token


class PolicyWeights:
    """Streams the student's weights, in an order and under names that vLLM loads.

    A tied embedding is sent twice, the second time as `lm_head.weight`. vLLM's CPU build packs the head, and it would
    keep a stale head if the config said "tied". Only tokens that the teacher has too are sent, so the engine cannot
    sample others.
    """

    def __init__(self, policy: Policy) -> None:
        self.model, self.ranks = policy.model, policy.ranks
        self.dtype, self.vocabulary = policy.dtype, policy.vocabulary
        self.device = device_of(policy.model)
        self.folder = folder_of(policy.files)
        self._config = config_of(policy.files)
        self._to_hf = family_of(self._config).to_hf

    @property
    def config_overrides(self) -> dict[str, Any]:
        """The entries in which the engine's model differs from `config.json`."""
        blocks = len(self.model.layers)
        changed = {"tie_word_embeddings": False, "vocab_size": self.vocabulary, "num_hidden_layers": blocks}
        kinds = self._config.get("layer_types")  # one per block, in configs that transformers has written
        return changed if kinds is None else {**changed, "layer_types": kinds[:blocks]}

    @property
    def config(self) -> dict[str, Any]:
        """The engine's `config.json`."""
        return {**self._config, **self.config_overrides, "torch_dtype": str(self.dtype).removeprefix("torch.")}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that `parts` yields, in the same order. Nothing is gathered."""
        adapters = adapter_names(self.model)
        named = {plain_name(name): parameter for name, parameter in self.model.named_parameters()}
        own: dict[str, Tensor] = {}
        for name, parameter in named.items():
            if name not in adapters:
                own[name] = torch.empty(parameter.shape, device="meta")
            if name == _EMBEDDING and isinstance(self.model.output, TiedLinear):
                own[_HEAD] = own[name]
        cut = {name: weight[: self.vocabulary] if name in _BY_TOKEN else weight for name, weight in own.items()}
        return {name: tuple(weight.shape) for name, weight in self._to_hf(cut, self._config).items()}

    @torch.no_grad()
    def parts(self) -> Iterator[dict[str, Tensor]]:
        """Yield whole tensors by name, part by part: the embedding, each block, then norm and head.

        Sharded parameters are gathered for it. So all ranks must iterate to the end.
        """
        model = self.model
        ends = self._whole(model.tok_embeddings, "tok_embeddings.")
        if isinstance(model.output, TiedLinear):
            ends[_HEAD] = ends[_EMBEDDING]
        yield self._to_hf(ends, self._config)
        del ends
        for number, block in enumerate(model.layers):
            yield self._to_hf(self._whole(block, f"layers.{number}."), self._config)
        ends = self._whole(model.norm, "norm.")
        if not isinstance(model.output, TiedLinear):
            ends |= self._whole(model.output, "output.")
        yield self._to_hf(ends, self._config)

    def _whole(self, module: nn.Module, prefix: str) -> dict[str, Tensor]:
        """A module's parameters under their full names. Adapters are merged, in fp32."""
        adapted = bool(adapter_names(module))
        weights = {
            plain_name(name): _gathered(parameter, torch.float32 if adapted else self.dtype)
            for name, parameter in module.named_parameters()
        }
        merged = merge_adapters(weights, module)
        named = {prefix + name: weight.to(self.dtype) for name, weight in merged.items()}
        return {name: weight[: self.vocabulary] if name in _BY_TOKEN else weight for name, weight in named.items()}


def _gathered(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A whole parameter in `dtype`. A sharded one is converted before it is gathered."""
    converted = parameter.detach().to(dtype)
    return converted.full_tensor() if isinstance(converted, DTensor) else converted
