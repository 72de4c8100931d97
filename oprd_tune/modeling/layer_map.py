"""Turn the layer settings of a config into pairs of student and teacher blocks. Blocks count from 1."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from oprd_tune.errors import ConfigError
from oprd_tune.types import LayerPair

_BRIDGE = "the section `bridge`, and the loss BridgedMSE or HiddenStateLoss; see docs/bridge.md"
_NAMED = {
    "all": lambda depth: range(1, depth + 1),
    "last": lambda depth: [depth],
    "even": lambda depth: range(2, depth + 1, 2),
    "odd": lambda depth: range(1, depth + 1, 2),
}


def resolve_layers(layers: str | Sequence[int], depth: int) -> list[int]:
    """Turn `all`, `last`, `even`, `odd` or a list into ascending student layers.

    Raises ConfigError for another name, an empty list, a repeated layer, or a layer outside 1 to `depth`.
    """
    if isinstance(layers, str):
        if layers not in _NAMED:
            raise ConfigError(f"layers is {layers!r}; allowed are {', '.join(_NAMED)} or a list such as [1,4]")
        chosen = list(_NAMED[layers](depth))
    else:
        chosen = sorted(layers)
    if not chosen:
        raise ConfigError(f"layers {layers!r} selects none of the student's {depth} layers")
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"layers is {list(layers)}; a layer may stand there once")
    if outside := [layer for layer in chosen if not 1 <= layer <= depth]:
        raise ConfigError(f"layers has {outside}; the student's layers count from 1 to {depth}")
    return chosen


def pair_layers(
    layers: str | Sequence[int],
    layer_pairs: Sequence[Sequence[int]] | None,
    *,
    student_depth: int,
    teacher_depth: int,
    bridged: bool = False,
) -> list[LayerPair]:
    """The layer pairs of the loss, ascending by student layer.

    If `layer_pairs` is given, as `[[student, teacher], …]`, then `layers` selects among these pairs. Otherwise layer ℓ
    is paired with `proportional_layer(ℓ)` if the models are `bridged`, or with layer ℓ if they have the same depth.

    Args:
        layers: `all`, `last`, `even`, `odd` or a list of student layers.

    Raises:
        ConfigError: if models of different depth have neither pairs nor a bridge; if a pair is malformed, repeated or
            out of range; or if it joins a last layer, whose state is taken after the final norm, with another layer.
    """
    chosen = resolve_layers(layers, student_depth)
    if layer_pairs is None and bridged:
        return [LayerPair(layer, proportional_layer(layer, student_depth, teacher_depth)) for layer in chosen]
    if layer_pairs is None:
        if student_depth != teacher_depth:
            raise ConfigError(
                f"the student has {student_depth} layers and the teacher {teacher_depth}: give `layer_pairs`, a list "
                f"of [student, teacher] blocks counted from 1 that ends with [{student_depth}, {teacher_depth}]. "
                f"Unrelated models need a bridge ({_BRIDGE})"
            )
        return [LayerPair(layer, layer) for layer in chosen]
    teacher_layer = _checked_pairs(layer_pairs, student_depth, teacher_depth)
    if isinstance(layers, str):
        chosen = [layer for layer in chosen if layer in teacher_layer]
    if not chosen or (unpaired := [layer for layer in chosen if layer not in teacher_layer]):
        missing = unpaired if chosen else f"{layers!r}"
        raise ConfigError(f"layers {missing} have no partner in layer_pairs, which pairs {sorted(teacher_layer)}")
    return [LayerPair(layer, teacher_layer[layer]) for layer in chosen]


def proportional_layer(layer: int, student_depth: int, teacher_depth: int) -> int:
    """φ(ℓ) = round((ℓ−1)/(n_S−1)·(n_T−1)) + 1, half to even (Eq. 11 of arXiv 2606.06021). Last layers are paired."""
    if student_depth == 1:
        return teacher_depth
    return round(Fraction((layer - 1) * (teacher_depth - 1), student_depth - 1)) + 1


def _checked_pairs(layer_pairs: Sequence[Sequence[int]], student_depth: int, teacher_depth: int) -> dict[int, int]:
    teacher_layer: dict[int, int] = {}
    for pair in layer_pairs:
        if len(pair) != 2:
            raise ConfigError(f"layer_pairs has {list(pair)}; each entry is [student, teacher]")
        student, teacher = pair
        if not (1 <= student <= student_depth and 1 <= teacher <= teacher_depth):
            raise ConfigError(
                f"layer_pairs has {list(pair)}; blocks count from 1, to {student_depth} for the student and to "
                f"{teacher_depth} for the teacher"
            )
        if student in teacher_layer:
            raise ConfigError(f"layer_pairs pairs student layer {student} twice")
        if (student == student_depth) != (teacher == teacher_depth):
            raise ConfigError(
                f"layer_pairs has {list(pair)}; a last layer is taken after the final norm, so it pairs with the other "
                f"model's last layer only: [{student_depth}, {teacher_depth}]"
            )
        teacher_layer[student] = teacher
    return teacher_layer


def check_widths(student_width: int, teacher_width: int) -> None:
    """Raise ConfigError if the widths differ: plain hidden-state distillation compares vectors of equal width."""
    if student_width != teacher_width:
        raise ConfigError(
            f"the student is {student_width} wide and the teacher {teacher_width}: plain OPRD compares states of one "
            f"width. Models of different width need a bridge ({_BRIDGE})"
        )
