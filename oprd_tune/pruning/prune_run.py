"""What the command `prune` does, and what it says of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torchtune.utils import get_device

from oprd_tune.config.settings import DTYPES
from oprd_tune.errors import ConfigError
from oprd_tune.modeling.folders import find_folder
from oprd_tune.pruning.pruner import RECORD, Pruned, own_dtype, prune
from oprd_tune.pruning.request import Request, Sizes, Source, check_request, read_source
from oprd_tune.pruning.sample_texts import Texts, built_in_texts, texts_of_file

_FIRST, _TOKENS = 64, 512  # texts of a file, and tokens of a text


def run(args: argparse.Namespace) -> None:
    """Prune as the command line says, and print what came of it. Raises ConfigError for a mistake."""
    request = Request(args.drop_blocks, args.blocks, args.width, args.heads, args.feed_forward)
    folder = find_folder("the model to prune", args.source)
    if args.out.exists():
        raise ConfigError(f"{args.out} exists already; give a folder that does not")
    source = read_source(folder)
    check_request(request, source)
    dtype = DTYPES[args.dtype] if args.dtype else own_dtype(source)
    device = _device(args.device)
    texts = _texts(args, source)
    print(f"{args.source}: {source.family.title}, {_told(source.sizes)}")
    print(f"measured on {texts.origin}, {texts.tokens:,} tokens, on {device} in {str(dtype).removeprefix('torch.')}")
    given: dict[str, Any] = {"dtype": dtype, "device": device, "starts": texts.starts}
    remarks = {"source": args.source, "texts": texts.origin, "tokens": texts.tokens, "scored": texts.scored}
    pruned = prune(source, request, texts.rows, args.out, remarks=remarks, **given)
    print(as_text(pruned, args.source, texts.scored))
    print(f"wrote {args.out}, with {RECORD}")


def _device(name: str | None) -> torch.device:
    """A device that the user names, never another; without a name CUDA if there is some, else the CPU."""
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = get_device(wanted)
        if device.type != torch.device(wanted).type:
            raise RuntimeError(f"torch finds no {wanted} here")
    except RuntimeError as error:
        raise ConfigError(f"--device {wanted} cannot be used: {error}") from error
    return device


def _texts(args: argparse.Namespace, source: Source) -> Texts:
    context = source.context
    most = min(_TOKENS, context) if args.max_tokens is None else args.max_tokens
    if args.first is not None and args.first < 1:
        raise ConfigError(f"--first is {args.first}; give 1 or more")
    if not 2 <= most <= context:
        raise ConfigError(f"--max-tokens is {most}; give 2 to {context}, which is the model's context")
    if args.texts is not None:
        return texts_of_file(
            args.texts,
            source.folder,
            column=args.column,
            answer_column=args.answer_column,
            template=args.template,
            first=_FIRST if args.first is None else args.first,
            max_tokens=most,
        )
    for option in ("column", "answer_column", "template", "first"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')} is about a file of texts; give --texts FILE too")
    return built_in_texts(source.folder, max_tokens=most)


def _told(sizes: Sizes) -> str:
    return (
        f"{sizes.blocks} blocks, width {sizes.width}, {sizes.heads} heads of {sizes.head_dim} "
        f"({sizes.groups} of keys and values), feed-forward {sizes.feed_forward}"
    )


def as_text(pruned: Pruned, teacher: str, scored: str) -> str:
    """What was kept and dropped, and what it changed, for the terminal.

    Args:
        teacher: the name of the whole model.
        scored: what the perplexity is of.
    """
    kept, before, after = pruned.kept, pruned.before, pruned.after
    lines = [f"pruned: {_told(after)}"]
    if dropped := pruned.dropped_blocks:
        lines += [
            f"  blocks        kept {_ranges(kept.blocks)}; dropped {_ranges(dropped)}",
            "  their change  " + ", ".join(f"{n}: {pruned.block_changes[n - 1]:.3f}" for n in dropped)
            + " (1 - mean cosine of input and output)",
        ]  # fmt: skip
    if kept.channels is not None:
        lines.append(f"  width         kept {after.width} of {before.width} channels")
    if kept.groups is not None:
        lines.append(f"  heads         kept {after.heads} of {before.heads} in each block")
    if kept.units is not None:
        lines.append(f"  feed-forward  kept {after.feed_forward} of {before.feed_forward} units in each block")
    small, large = pruned.parameters[1], pruned.parameters[0]
    lines.append(f"  parameters    {large:,} before, {small:,} after ({small / large:.1%})")
    first, last = pruned.perplexity
    lines.append(f"  perplexity    {first:.4g} before, {last:.4g} after, of the {scored}")
    if dropped and kept.channels is None:
        pairs = str(pruned.layer_pairs).replace(" ", "")
        lines.append(f"to heal it: teacher={teacher} 'layer_pairs={pairs}'")
    return "\n".join(lines)


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, such as `1-18, 20`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
