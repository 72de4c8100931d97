"""Checksums that show which parameters of an engine differ from those that were sent.

Log-probabilities can show that some weights are stale, but not which. In bf16, their rounding may hide one missed step.
A checksum shows the change of any single bit of a parameter. Several changes could cancel each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from oprd_tune.errors import RolloutError

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_FUSED["up_proj"] = "gate_up_proj"
_PADDED = 64  # vLLM pads embedding and head with rows of zeros to a multiple of this
_EMPTY = hashlib.sha256().hexdigest()
_SHOWN = 6


class Checksums(Protocol):
    """Computes checksums of parameters on their way to an engine."""

    def passing(self, parts: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Yield the given parts of a model unchanged, and add them to the checksums."""

    @property
    def by_name(self) -> Mapping[str, int | str]:
        """The checksums, by vLLM's names of parameters. vLLM joins q, k and v, and it joins gate and up."""


class Fingerprints:
    """Checksums from `_bit_sum`. They take one memory-bound pass over the parameters, on any device."""

    def __init__(self) -> None:
        self.by_name: dict[str, int] = {}

    def passing(self, parts: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Yield the parts, and add them to the fingerprints."""
        sums: dict[str, Tensor] = {}
        rows: dict[str, int] = {}
        for part in parts:
            for name, weight in part.items():
                fused = _fused(name)
                first = rows.get(fused, 0)
                rows[fused] = first + len(weight)
                sums[fused] = sums.get(fused, 0) + _bit_sum(weight, first)
            yield part
        self.by_name = {name: int(total) for name, total in sums.items()}


class Digests:
    """SHA-256 checksums, which servers compute too. Embedding and head include the rows of zeros that vLLM adds.

    If `enabled` is False, nothing is computed.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self.by_name: dict[str, str] = {}

    def passing(self, parts: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Yield the parts, and add them to the digests."""
        hashes: dict[str, hashlib._Hash] = {}
        for part in parts:
            for name, weight in part.items() if self._enabled else ():
                digest = hashes.setdefault(_fused(name), hashlib.sha256())
                digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                if name in ("model.embed_tokens.weight", "lm_head.weight"):
                    digest.update(bytes(-len(weight) % _PADDED * weight[0].nbytes))
            yield part
        self.by_name = {name: digest.hexdigest() for name, digest in hashes.items()}


def fingerprints_of(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Fingerprints of an engine's model. Parameters are first converted to `dtype`, in which they were sent.

    An empty parameter, which the engine keeps in another form, has no fingerprint.
    """
    return {name: int(_bit_sum(p.detach().to(dtype), 0)) for name, p in model.named_parameters() if p.numel()}


def engine_names(names: Iterable[str]) -> set[str]:
    """vLLM's names for parameters with these Hugging Face names."""
    return {_fused(name) for name in names}


def check_arrived(sent: Mapping[str, int | str], found: Mapping[str, int | str], where: str) -> None:
    """Compare the checksums of what was sent with those of what an engine has. RolloutError names what differs.

    vLLM's CPU build keeps matrices in a packed form that cannot be read. These are missing or empty in `found`. Only
    log-probabilities can check them.
    """
    seen = {name: value for name, value in found.items() if value != _EMPTY}
    stale = [name for name, value in seen.items() if value != sent.get(name)]
    if stale or not seen:
        more = f" and {len(stale) - _SHOWN} more" if len(stale) > _SHOWN else ""
        which = f"{', '.join(stale[:_SHOWN])}{more} {'is' if len(stale) == 1 else 'are'}" if seen else "all of them are"
        raise RolloutError(f"{where} does not have the weights that it was sent: {which} stale")


def _bit_sum(weight: Tensor, first_row: int) -> Tensor:
    """Σ over rows i of (2 i + 1) · Σ of the row's words, modulo 2⁶⁴. An odd factor is invertible: no bit is lost."""
    rows = weight.contiguous().view(len(weight), -1)
    if rows.storage_offset() * rows.element_size() % max(_WORDS):  # a view may not be aligned to words
        rows = rows.clone()
    width = next(w for w in _WORDS if rows.shape[1] * rows.element_size() % w == 0)
    sums_R = rows.view(_WORDS[width]).sum(1, dtype=torch.int64)
    factors_R = torch.arange(first_row, first_row + len(sums_R), device=sums_R.device) * 2 + 1
    return (sums_R * factors_R).sum()


def _fused(name: str) -> str:
    owner, module, kind = name.rsplit(".", 2) if name.count(".") > 1 else ("", *name.rsplit(".", 1))
    return ".".join(part for part in (owner, _FUSED.get(module, module), kind) if part)
