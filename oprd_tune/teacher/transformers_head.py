"""The heads of transformers' models. Some do more than multiply by a matrix: they scale or cap the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules.tied_linear import TiedLinear

from oprd_tune.errors import ConfigError
from oprd_tune.torchtune_compat import set_output

# Fields of config.json that change the head's product after it is formed.
_LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "logit_softcapping")
_PROBED, _LARGE = 8, 100.0  # states on which a head is compared, and the largest logit there


class ScaledHead(nn.Module):
    """A head whose logits are more than a product: scaled, capped or with a bias.

    transformers' own forward pass computes them from given states.

    Attributes:
        more_than_a_matrix: what is done to the product, for messages.
    """

    def __init__(self, model: Any, more_than_a_matrix: str) -> None:
        super().__init__()
        self._model, self.more_than_a_matrix = model, more_than_a_matrix

    def forward(self, state_BSD: Tensor) -> Tensor:
        """States after the norm, [B, S, D], to logits [B, S, V]."""
        return _logits(self._model, state_BSD)


class TiedScaledHead(TiedLinear):
    """A `ScaledHead` whose matrix is the embedding's. Like every tied head, it is no module."""

    def __init__(self, embedding: nn.Module, model: Any, more_than_a_matrix: str) -> None:
        super().__init__(embedding)
        self._model, self.more_than_a_matrix = model, more_than_a_matrix

    def __call__(self, state_BSD: Tensor) -> Tensor:
        """States after the norm, [B, S, D], to logits [B, S, V]."""
        return _logits(self._model, state_BSD)


@torch.no_grad()
def probe_head(model: Any, causal: Any) -> None:
    """Make a loaded plain head a scaled one if transformers does more to its logits than the config's fields told.

    Args:
        model: a `TransformersDecoder`.
        causal: the model that `model` was made of.
    """
    if hasattr(model.output, "more_than_a_matrix"):
        return
    weight = model.tok_embeddings.weight
    state_BSD = weight[: min(_PROBED, len(weight))].unsqueeze(0)  # any states do
    state_BSD = state_BSD * (
        _LARGE / model.output(state_BSD).abs().max()
    )  # large logits: a cap hardly changes small ones
    ours, theirs = model.output(state_BSD).float(), _logits(causal, state_BSD).float()
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
        set_output(model, _scaled(causal, model.output, "a product that transformers changes afterwards"))


class GivenStates(nn.Module):
    """Stands for the base model, in front of its head."""

    state_BSD: Tensor

    @property
    def decoder(self) -> GivenStates:
        """Itself, for families whose head calls the decoder within the base model."""
        return self

    def forward(self, *_: Any, **__: Any) -> _Output:
        return _Output(self.state_BSD)


class _Output:
    """A base model's output: its states, and nothing else."""

    def __init__(self, state_BSD: Tensor) -> None:
        self.last_hidden_state = state_BSD

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


def _logits(model: Any, state_BSD: Tensor) -> Tensor:
    given = getattr(model, model.base_model_prefix)
    given.state_BSD = state_BSD
    try:
        return model.forward(inputs_embeds=state_BSD, use_cache=False).logits
    finally:
        del given.state_BSD  # the states would live on


def head_of(model: Any, head: Any, embedding: Any, config: Any) -> Any:
    """The head that gives transformers' logits: a `TiedLinear` or a linear layer if that will do, else a scaled head.

    Args:
        model: transformers' causal language model, with `GivenStates` in its base model's place.
        head: its output embedding.
        embedding: its input embedding.
        config: transformers' config of its decoder.

    Raises:
        ConfigError: if it has no head.
    """
    if head is None or not hasattr(head, "weight"):
        raise ConfigError(f"{type(model).__name__} has no LM head; give the folder of a causal language model")
    plain = TiedLinear(embedding) if head.weight is embedding.weight else head
    for field in _LOGIT_FIELDS:
        if getattr(config, field, None) not in (None, 1):
            return _scaled(model, plain, f"a product changed by {field}={getattr(config, field)} of config.json")
    return plain if getattr(head, "bias", None) is None else _scaled(model, plain, "a product with a bias added")


def _scaled(model: Any, plain: Any, what: str) -> Any:
    if isinstance(plain, TiedLinear):
        return TiedScaledHead(plain.tied_module, model, what)
    return ScaledHead(model, what)
