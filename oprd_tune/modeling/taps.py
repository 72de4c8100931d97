"""Taps hand over hidden states of chosen layers as soon as they are produced.

A tap is a forward hook on a block, outside of the checkpoint wrapper if there is one. It fires once, in the forward
pass only. The state that it sees costs no extra memory, because it is the next block's input anyway. The top tap
replaces the LM head, which therefore does not run, and the blocks above it are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from oprd_tune.modeling.output import OutputStandIn, swapped_output
from oprd_tune.packing import Packed
from oprd_tune.torchtune_compat import set_output

OnState = Callable[[int, Tensor], Tensor]


@contextmanager
def layer_taps(model: TransformerDecoder, layers: Sequence[int], on_state: OnState) -> Iterator[None]:
    """Within the scope, a forward pass hands the outputs of `layers` to `on_state` and runs no LM head.

    The state of the model's last layer is taken after the final norm; every other state is its block's raw output.
    Blocks above the highest tapped layer do not run. The forward pass returns what `on_state` returned for that layer:
    FSDP starts its backward pass from the model's own output, so this value must be in that output's graph.

    Args:
        model: a torchtune decoder: plain, checkpointed, compiled per layer, with LoRA, or sharded.
        layers: ascending and unique, from 1 to the number of blocks.
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


def _hook(layer: int, on_state: OnState) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], None]:
    @torch.compiler.disable
    def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        on_state(layer, output[0] if isinstance(output, tuple) else output)  # as a few families of transformers do

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
    """Permanently remove from a frozen decoder what taps up to layer `top` do not need.

    The head is removed. If `top` is not the last layer, so are the blocks above it and the final norm.
    """
    if top < len(model.layers):
        model.layers, model.norm = nn.ModuleList(list(model.layers)[:top]), nn.Identity()
    set_output(model, nn.Identity())


@torch.no_grad()
def collect_states(
    model: TransformerDecoder,
    tokens_BS: Tensor,
    wanted: Sequence[tuple[int, Tensor, Callable[[Tensor], Tensor] | None]],
    packed: Packed | None = None,
) -> list[Tensor]:
    """States of a frozen model at chosen layers and positions, from one forward pass.

    Args:
        model: a decoder, possibly cut after the highest layer in `wanted`.
        tokens_BS: right-padded token ids.
        wanted: triples of a layer, positions [T] in the flattened [B * S] grid, and a function to apply to the states
            there, or None. Entries with the same layer and position tensor share one copy of the states.
        packed: how the model reads the rows without padding, among whose tokens positions then count; None for as they
            are.

    Returns:
        For each entry, the states [T, C] in the model's own dtype, or the function's result on them.
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
        if packed is None:
            model(tokens_BS)
        else:
            packed.read_by(model, tokens_BS)
    return [found[place] for place in range(len(wanted))]
