"""Prune a model folder: measure, cut, write, and load what was written."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torchtune.modules import TransformerDecoder

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.from_folder import decoder
from oprd_tune.modeling.weights import build_on_meta, check_weights, hugging_face_checkpointer, load_decoder
from oprd_tune.pruning.cutting import Kept, cut_config, cut_weights
from oprd_tune.pruning.importance import (
    Rows,
    largest,
    least_changing,
    measure_blocks,
    measure_width,
    perplexity,
)
from oprd_tune.pruning.request import Request, Sizes, Source
from oprd_tune.run.export import quiet, staged

RECORD = "pruned.json"
# Mistral's params.json repeats the sizes of the whole model.
_LEFT_OUT = ("config.json", "params.json", "adapter_config.json", RECORD)
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_COPIED_NAMES = ("LICENSE", "NOTICE")
_INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class Pruned:
    """What came of pruning.

    Attributes:
        kept: what stayed; only what was asked to shrink has indices.
        block_changes: for each block of the whole model, 1 − mean cosine of its input and output.
        parameters: counts before and after. A tied head counts once.
        perplexity: of the texts, before and after.
    """

    kept: Kept
    before: Sizes
    after: Sizes
    block_changes: Sequence[float]
    parameters: tuple[int, int]
    perplexity: tuple[float, float]
    dtype: torch.dtype

    @property
    def dropped_blocks(self) -> list[int]:
        """The numbers of the blocks that are gone, from 1."""
        return [number for number in range(1, self.before.blocks + 1) if number not in self.kept.blocks]

    @property
    def layer_pairs(self) -> list[list[int]]:
        """Each block of the pruned model with the block that it was: the config key `layer_pairs`."""
        return [[place, number] for place, number in enumerate(self.kept.blocks, start=1)]


def own_dtype(source: Source) -> torch.dtype:
    """The dtype that a folder's `config.json` states; fp32 if it states none.

    Raises:
        ConfigError: if it states one that is none of fp32, bf16 and fp16.
    """
    stated = source.config.get("dtype") or source.config.get("torch_dtype") or "float32"
    known = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    if stated not in known:
        raise ConfigError(f"{source.folder}/config.json states dtype {stated}; give --dtype fp32 or --dtype bf16")
    return known[stated]


def prune(
    source: Source,
    request: Request,
    rows: Rows,
    out: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    starts: Sequence[int] | None = None,
    remarks: dict[str, Any] | None = None,
) -> Pruned:
    """Write a pruned copy of a model folder.

    The model is loaded once. Blocks are measured on the whole model; width, heads and inner units are then measured on
    the model without the dropped blocks. The folder is loaded as a run loads it before it takes its place.

    Args:
        request: has passed `check_request`.
        rows: token ids of the texts to measure on.
        out: the folder to write.
        starts: where the perplexity starts in each text, see `importance.perplexity`.
        dtype: of the computation, and of the weights that are written.
        remarks: what `pruned.json` says beside the measures.

    Raises:
        ConfigError: if `out` exists, if the weights do not fit `config.json`, or if a text has unknown tokens.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; give a folder that does not")
    _check_rows(rows, source)
    with quiet():
        model = _load(source.folder, dtype, device)
        before, changes = measure_blocks(model, rows, starts)
        after = request.after(source.sizes)
        kept = _choose(model, request, after, changes, rows)
        whole = source.family.to_hf(model.state_dict(), source.config)
        cut = cut_weights(whole, kept, source.sizes)
        counts = sum(weight.numel() for weight in whole.values()), sum(weight.numel() for weight in cut.values())
        del model, whole
        with staged(out) as folder:
            _copy_other_files(source.folder, folder)
            config = cut_config(source.config, kept, after, dtype)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            save_file(cut, folder / "model.safetensors", metadata={"format": "pt"})
            del cut
            found = perplexity(_load(folder, dtype, device), rows, starts)
            pruned = Pruned(kept, source.sizes, after, changes, counts, (before, found), dtype)
            (folder / RECORD).write_text(_as_json({**(remarks or {}), **as_data(pruned)}))
    return pruned


def _check_rows(rows: Rows, source: Source) -> None:
    largest_token, longest = max(map(max, rows)), max(map(len, rows))
    if largest_token >= source.vocabulary:
        raise ConfigError(
            f"a text has the token {largest_token}, but the model knows {source.vocabulary}; the tokenizer "
            f"in {source.folder} is another model's"
        )
    if longest > source.context:
        raise ConfigError(f"a text has {longest} tokens, but the model reads at most {source.context}")


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> TransformerDecoder:
    """The model of a folder, as a run loads it."""
    with tempfile.TemporaryDirectory() as scratch:
        files = hugging_face_checkpointer(str(folder), scratch)

        def build() -> TransformerDecoder:
            return decoder(str(folder))

        check_weights(str(folder), files, build_on_meta(build))
        return load_decoder(build, files, dtype=dtype, device=device).eval()


def _choose(model: TransformerDecoder, request: Request, after: Sizes, changes: Sequence[float], rows: Rows) -> Kept:
    """What to keep. Measures width on the model without the dropped blocks, and leaves the model whole."""
    depth = len(model.layers)
    dropped = request.drop_blocks or least_changing(changes, depth - after.blocks)
    blocks = [number for number in range(1, depth + 1) if number not in dropped]
    if not request.narrows:
        return Kept(blocks)
    whole = model.layers
    model.layers = nn.ModuleList(whole[number - 1] for number in blocks)
    found = measure_width(model, rows)
    model.layers = whole
    return Kept(
        blocks,
        channels=None if request.width is None else largest(found.channels_D, after.width),
        groups=None if request.heads is None else [largest(scores, after.groups) for scores in found.groups],
        units=None if request.feed_forward is None else [largest(scores, after.feed_forward) for scores in found.units],
    )


def _copy_other_files(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, the defaults of generation and the licence; neither weights nor code."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _COPIED_SUFFIXES or path.stem in _COPIED_NAMES
        if path.is_file() and wanted and path.name not in _LEFT_OUT and not path.name.endswith(_INDEX_SUFFIX):
            shutil.copyfile(path, target / path.name)


def _as_json(data: dict[str, Any]) -> str:
    """JSON with one key a line: lists may have thousands of numbers."""
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()) + "\n}\n"


def as_data(pruned: Pruned) -> dict[str, Any]:
    """The content of `pruned.json`. Blocks count from 1; channels, groups and units from 0, as in the tensors."""
    kept = pruned.kept
    return {
        "blocks_kept": list(kept.blocks),
        "blocks_dropped": pruned.dropped_blocks,
        "block_changes": list(pruned.block_changes),
        "channels_kept": None if kept.channels is None else kept.channels.tolist(),
        "groups_kept": None if kept.groups is None else [indices.tolist() for indices in kept.groups],
        "units_kept": None if kept.units is None else [indices.tolist() for indices in kept.units],
        "sizes_before": asdict(pruned.before),
        "sizes_after": asdict(pruned.after),
        "parameters_before": pruned.parameters[0],
        "parameters_after": pruned.parameters[1],
        "perplexity_before": pruned.perplexity[0],
        "perplexity_after": pruned.perplexity[1],
        "dtype": str(pruned.dtype).removeprefix("torch."),
        "layer_pairs": pruned.layer_pairs,
    }
