"""What shall be kept of a model, checked against its `config.json` before weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.families import STATED, Family, family_of, transformers_config
from oprd_tune.modeling.families.numbers import built_numbers, differences, stated_numbers
from oprd_tune.modeling.folders import read_config
from oprd_tune.modeling.from_folder import decoder

# transformers refuses a config.json of these whose hidden_size is no multiple of num_attention_heads.
_WIDTH_DIVIDES_BY_HEADS = {"llama"}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder.

    Attributes:
        groups: heads of keys and values; as many query heads as `heads // groups` share one.
        head_dim: the size of a head. Pruning never changes it.
    """

    blocks: int
    width: int
    heads: int
    groups: int
    head_dim: int
    feed_forward: int

    @property
    def heads_in_group(self) -> int:
        """How many query heads share one head of keys and values."""
        return self.heads // self.groups


@dataclass(frozen=True)
class Request:
    """What shall be kept; None keeps all.

    Attributes:
        drop_blocks: blocks to drop, counted from 1.
        blocks: how many blocks to keep, in place of `drop_blocks`: those that change the states most.
        width: how many channels of the hidden states to keep.
        heads: how many query heads to keep in each block, in whole groups.
        feed_forward: how many inner units of each feed-forward layer to keep.
    """

    drop_blocks: tuple[int, ...] = ()
    blocks: int | None = None
    width: int | None = None
    heads: int | None = None
    feed_forward: int | None = None

    @property
    def narrows(self) -> bool:
        """Whether anything but the number of blocks may change."""
        return any(count is not None for count in (self.width, self.heads, self.feed_forward))

    def after(self, sizes: Sizes) -> Sizes:
        """The sizes that a model has after pruning."""
        heads = self.heads or sizes.heads
        return replace(
            sizes,
            blocks=self.blocks or sizes.blocks - len(self.drop_blocks),
            width=self.width or sizes.width,
            heads=heads,
            groups=heads // sizes.heads_in_group,
            feed_forward=self.feed_forward or sizes.feed_forward,
        )


@dataclass(frozen=True)
class Source:
    """A model folder that can be pruned.

    Attributes:
        config: the content of its `config.json`.
        vocabulary: how many tokens it knows.
        context: the most tokens that it reads.
        free_heads: whether the family's builder takes any number of heads, whatever the width.
    """

    folder: Path
    config: Mapping[str, Any]
    family: Family
    sizes: Sizes
    vocabulary: int
    context: int
    free_heads: bool


def read_source(folder: Path) -> Source:
    """Read what a folder says of its model. No weights are read.

    Raises:
        ConfigError: if the family is none of our students', or if no builder here computes what `config.json` asks for.
    """
    config = read_config(folder)
    try:
        family = family_of(config)
    except ConfigError as error:
        raise ConfigError(f"{folder} cannot be pruned: {error}") from error
    if missing := sorted(STATED - config.keys()):
        raise ConfigError(f"{folder}/config.json does not say {missing[0]}; add it, as its model's card states it")
    stated = transformers_config(folder)
    numbers = stated_numbers(stated)
    with torch.device("meta"):
        built = built_numbers(decoder(str(folder)))
    if different := differences(numbers, built):
        raise ConfigError(f"{folder} cannot be pruned, because no builder here can do this: {'; '.join(different)}")
    sizes = Sizes(
        blocks=numbers["num_hidden_layers"],
        width=numbers["hidden_size"],
        heads=numbers["num_attention_heads"],
        groups=numbers["num_key_value_heads"],
        head_dim=numbers["head_dim"],
        feed_forward=numbers["intermediate_size"],
    )
    arguments = family.arguments(stated)
    return Source(
        folder,
        config,
        family,
        sizes,
        vocabulary=arguments["vocab_size"],
        context=arguments["max_seq_len"],
        free_heads="head_dim" in arguments,
    )


def check_request(request: Request, source: Source) -> None:
    """Find out whether a model can be cut so.

    Raises:
        ConfigError: if nothing is asked for, if a number is out of range, or if width and heads do not fit each other.
    """
    if not request.drop_blocks and request.blocks is None and not request.narrows:
        raise ConfigError("nothing to prune: give --drop-blocks or --blocks, --width, --heads or --feed-forward")
    sizes = source.sizes
    _check_depth(request, sizes.blocks)
    for option, value, most in (
        ("--width", request.width, sizes.width),
        ("--heads", request.heads, sizes.heads),
        ("--feed-forward", request.feed_forward, sizes.feed_forward),
    ):
        if value is not None and not 1 <= value <= most:
            raise ConfigError(f"{option} is {value}; the model has {most}, so give 1 to {most}")
    if request.heads is not None and request.heads % sizes.heads_in_group:
        raise ConfigError(
            f"--heads is {request.heads}, but {sizes.heads_in_group} query heads share one of keys and values; give a "
            f"multiple of {sizes.heads_in_group}, up to {sizes.heads}"
        )
    _check_width_and_heads(request, source)


def _check_depth(request: Request, blocks: int) -> None:
    dropped = request.drop_blocks
    if dropped and request.blocks is not None:
        raise ConfigError("--drop-blocks names blocks and --blocks lets the texts choose; give one of them")
    if wrong := [number for number in dropped if not 1 <= number <= blocks]:
        raise ConfigError(f"--drop-blocks names {wrong[0]}, but the model's blocks are 1 to {blocks}")
    if len(set(dropped)) < len(dropped):
        raise ConfigError(f"--drop-blocks {','.join(map(str, dropped))} names a block twice")
    if len(dropped) == blocks:
        raise ConfigError(f"--drop-blocks names all {blocks} blocks; leave at least one")
    least = min(2, blocks)
    if request.blocks is not None and not least <= request.blocks <= blocks:
        raise ConfigError(
            f"--blocks is {request.blocks}; give {least} to {blocks}, because the first and the last always stay"
        )


def _check_width_and_heads(request: Request, source: Source) -> None:
    after = request.after(source.sizes)
    title, head_dim = source.family.title, source.sizes.head_dim
    if not source.free_heads and after.width != after.heads * head_dim:
        centre = after.width // head_dim if request.heads is None else after.heads
        pairs = [f"--heads {h} --width {h * head_dim}" for h in _nearest(centre, source.sizes)]
        raise ConfigError(
            f"{title} has heads of {head_dim} and needs width = heads x {head_dim}, but these would be {after.heads} "
            f"heads and width {after.width}; near them, allowed are {', '.join(pairs)}"
        )
    if source.family.config_name in _WIDTH_DIVIDES_BY_HEADS and after.width % after.heads:
        down = after.width // after.heads * after.heads
        up = down + after.heads
        near = [width for width in (down, up) if 0 < width <= source.sizes.width]
        raise ConfigError(
            f"transformers takes a {title} model only if its width is a multiple of its heads, but {after.width} is no "
            f"multiple of {after.heads}; near it are --width {' and '.join(map(str, near))}, or give other --heads"
        )


def _nearest(heads: int, sizes: Sizes) -> list[int]:
    """Up to three numbers of heads near a given one, in whole groups."""
    step = sizes.heads_in_group
    whole = heads // step * step
    return [count for count in (whole - step, whole, whole + step) if step <= count <= sizes.heads]
