"""The torchtune decoder that a model folder's `config.json` describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from oprd_tune.config.checks import check_not_negative, check_positive, check_whole
from oprd_tune.errors import ConfigError, nearest
from oprd_tune.modeling.families import STATED, family_of, transformers_config
from oprd_tune.modeling.families.numbers import built_numbers, differences, stated_numbers
from oprd_tune.modeling.folders import read_config

_MOST_POSITIONS = 2**24  # each has a row in a table of rotations
_ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")


@dataclass(frozen=True)
class _Adapters:
    """The section `lora`."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    attn_modules: list[str] = field(default_factory=lambda: list(_ATTENTION))
    apply_to_mlp: bool = True
    use_dora: bool = False

    def __post_init__(self) -> None:
        check_whole("lora.rank", self.rank)
        check_positive("lora.alpha", self.alpha)
        check_not_negative("lora.dropout", self.dropout)
        given = self.attn_modules
        # torchtune's builders pass over names that they do not know.
        if not isinstance(given, list) or not set(given) <= set(_ATTENTION) or not (given or self.apply_to_mlp):
            raise ConfigError(
                f"lora.attn_modules is {given!r}; give a list of {', '.join(_ATTENTION)}, and at least one of them, or "
                "apply_to_mlp"
            )
        for name in ("apply_to_mlp", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"lora.{name} is {getattr(self, name)!r}; give true or false")

    def arguments(self) -> dict[str, Any]:
        """The arguments of torchtune's builders."""
        return {
            "lora_attn_modules": list(self.attn_modules),
            "apply_lora_to_mlp": self.apply_to_mlp,
            "lora_rank": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_dora": self.use_dora,
        }


def decoder(path: str, max_seq_len: int | None = None, lora: Mapping[str, Any] | None = None) -> TransformerDecoder:
    """Build a model without weights, with every number from `config.json`.

    Args:
        path: a Hugging Face model folder.
        max_seq_len: the longest sequence in tokens; None for the model's context.
        lora: adapters to train instead of the weights: `rank` (8), `alpha` (16), `dropout` (0), `attn_modules` (all
            four), `apply_to_mlp` (true) and `use_dora` (false).

    Raises:
        ConfigError: if the folder cannot be read, or if its architecture is not supported.
    """
    folder = Path(path).expanduser()
    family = family_of(read_config(folder))
    arguments = family.arguments(transformers_config(folder))
    if max_seq_len is not None:
        check_whole("max_seq_len", max_seq_len, at_most=_MOST_POSITIONS)
        arguments["max_seq_len"] = max_seq_len
    if lora is None:
        return family.build(**arguments)
    if not isinstance(lora, Mapping):
        raise ConfigError(f"lora is {lora!r}; give a section, such as {{rank: 8}}")
    known = {f.name for f in fields(_Adapters)}
    for key in lora:
        if key not in known:
            raise ConfigError(f"unknown config key 'lora.{key}'{nearest(key, known)}")
    return family.build_lora(**_Adapters(**lora).arguments(), **arguments)


def can_build(folder: Path) -> bool:
    """Whether `decoder` can be the model of a folder: its family is known, and every number of `config.json` fits."""
    config = read_config(folder)
    try:
        family = family_of(config)
    except ConfigError:
        return False
    stated = transformers_config(folder)
    with torch.device("meta"):
        model = family.build(**family.arguments(stated))
    return config.keys() >= STATED and not differences(stated_numbers(stated), built_numbers(model))
