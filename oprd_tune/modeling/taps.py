"""Hidden states at chosen layers, handed over where they are produced.

A tap is a forward hook on the outside of a block, and of its checkpoint wrapper if it has one. It fires once, in the
forward pass only, and sees a tensor that is alive anyway as the next block's input. The last tap sits in the place of
the LM head, which therefore never runs, and blocks above it are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from oprd_tune.modeling.output import OutputStandIn, swapped_output
from oprd_tune.torchtune_compat import set_output

OnState = Callable[[int, Tensor], Tensor]


@contextmanager
def layer_taps(model: TransformerDecoder, layers: Sequence[int], on_state: OnState) -> Iterator[None]:
    """Within the scope, a forward pass hands the outputs of `layers` to `on_state` and runs no LM head.

    Layers count from 1. Layer n, the top, is taken after the final norm; every other one is its block's raw output.
    Blocks above the highest tapped layer do not run. The forward pass returns what `on_state` returned for that
    layer, which keeps the value in the graph of the model's own output: FSDP needs that to start its backward pass.

    Args:
        model: a torchtune decoder: plain, checkpointed, compiled per layer, with LoRA, or sharded.
        layers: ascending, unique, between 1 and the number of blocks.
        on_state: called as `on_state(layer, state_BSD)` in ascending order. It must not modify the state in place.

    Raises:
        ValueError: if `layers` is empty, unsorted or out of range.
        RuntimeError: if the model is already tapped.
    """
    depth = len(model.layers)
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] > depth:
        raise ValueError(f"layers are {list(layers)}; they must ascend without repetition within 1 to {depth}")
    *lower, top = layers
    with ExitStack() as scope:
        scope.enter_context(swapped_output(model, lambda head: _TopTap(top, on_state)))
        if top < depth:
            scope.enter_context(_stopped_after(model, top))
        for layer in lower:
            hook = model.layers[layer - 1].register_forward_hook(_hook(layer, on_state))
            scope.callback(hook.remove)
        yield


def _hook(layer: int, on_state: OnState) -> Callable[[nn.Module, object, Tensor], None]:
    @torch.compiler.disable
    def hook(module: nn.Module, inputs: object, state_BSD: Tensor) -> None:
        on_state(layer, state_BSD)

    return hook


class _TopTap(OutputStandIn):
    def __init__(self, layer: int, on_state: OnState) -> None:
        super().__init__()
        self._layer, self._on_state = layer, on_state

    def forward(self, state_BSD: Tensor) -> Tensor:
        return self._on_state(self._layer, state_BSD)


@contextmanager
def _stopped_after(model: TransformerDecoder, top: int) -> Iterator[None]:
    layers, norm = model.layers, model.norm
    model.layers, model.norm = nn.ModuleList(list(layers)[:top]), nn.Identity()
    try:
        yield
    finally:
        model.layers, model.norm = layers, norm


def cut_after(model: TransformerDecoder, top: int) -> None:
    """Remove for good what a tap at layer `top` does not need: higher blocks, then the final norm, and the head.

    Args:
        model: a frozen decoder that is only ever tapped from now on.
        top: the highest layer that will be tapped, from 1.
    """
    if top < len(model.layers):
        model.layers, model.norm = nn.ModuleList(list(model.layers)[:top]), nn.Identity()
    set_output(model, nn.Identity())


@torch.no_grad()
def collect_states(
    model: TransformerDecoder,
    tokens_BS: Tensor,
    wanted: Sequence[tuple[int, Tensor, Callable[[Tensor], Tensor] | None]],
) -> list[Tensor]:
    """States of a frozen model at chosen layers and positions, from one forward pass.

    Args:
        model: a decoder, possibly cut after the highest layer in `wanted`.
        tokens_BS: right-padded token ids.
        wanted: a layer, as for `layer_taps`, positions [T] in the flattened [B * S] grid, and what to make of
            the states there, if not to keep them. A layer may stand there more than once; states are then shared.

    Returns:
        For each of them, the states [T, C] in the model's own dtype, or what was made of them.
    """
    found: dict[int, Tensor] = {}

    def keep(layer: int, state_BSD: Tensor) -> Tensor:
        sliced: dict[int, Tensor] = {}
        for place, (wanted_layer, index_T, make) in enumerate(wanted):
            if wanted_layer == layer:
                if id(index_T) not in sliced:
                    sliced[id(index_T)] = state_BSD.flatten(0, 1)[index_T]
                state_TC = sliced[id(index_T)]
                found[place] = state_TC if make is None else make(state_TC)
        return state_BSD.new_zeros(())

    with layer_taps(model, sorted({layer for layer, _, _ in wanted}), keep):
        model(tokens_BS)
    return [found[place] for place in range(len(wanted))]
