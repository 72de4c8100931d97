"""What gpu_check.py asks of a card, and whether it was reached."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

ENFORCED_ON = re.compile(r"H100|H200")  # the cards that the bars were set for
OBJECTIVES = {"oprd": "OPRD", "topk": "top-16", "sampled": "sampled token", "vopd": "vOPD", "full": "full KL"}
SHORT, LONG = 4096, 16_384  # tokens of an update
FLOOR = "bound and one state per layer and token"  # a target or its gradient waits until the backward pass comes there
MATMUL_SHARE = "both models without head and loss: share of the measured matmul rate"
PACKED = "packed rows: time / rows padded as the best cut does"
APART = "packed rows: distance of gradients to those of padded rows, relative"
NATIVE = "native decoding, tokens/s"
SYNC = "vLLM: sync and proof, share of a step of 64 × 1,024 tokens"
OTHER_PHASES = "flagship: largest phase beside rollout, teacher, student, optimizer; share of a step"
MEMORY = "flagship: error of the predicted memory"


@dataclass(frozen=True)
class Bar:
    """A limit of a figure.

    Attributes:
        figure: its name.
        parts: that it comes from.
        least: whether the limit is the least allowed value, not the largest.
        style: of a value, for `format`.
    """

    figure: str
    limit: float
    parts: tuple[str, ...]
    least: bool = False
    style: str = ".2f"

    def verdict(self, value: float | None) -> str:
        """`ok`, `missed` or `not measured`. A value that is no number is missed."""
        if value is None:
            return "not measured"
        return "ok" if (value >= self.limit if self.least else value <= self.limit) else "missed"

    def row(self, value: float | None) -> dict[str, str]:
        """A row of the report."""
        sign = "≥" if self.least else "≤"
        shown = "–" if value is None else format(value, self.style)
        limit = f"{sign} {format(self.limit, self.style)}"
        return {"what": self.figure, "measured": shown, "bar": limit, "": self.verdict(value)}


def ratio_name(objective: str, what: str, to: str, tokens: int) -> str:
    """The figure of an update: `what` (time or Δpeak), as a ratio `to` the bound, the floor or the plain form."""
    return f"{OBJECTIVES[objective]}: {what} / {to}, {tokens:,} tokens"


def _of_updates() -> list[Bar]:
    to_bound = {("oprd", SHORT): 1.08, ("oprd", LONG): 1.03}
    bars = []
    for tokens in (SHORT, LONG):
        for objective in OBJECTIVES:
            limit = to_bound.get((objective, tokens), 1.10 if objective == "topk" else 1.20)
            bars.append(Bar(ratio_name(objective, "time", "bound", tokens), limit, ("update",)))
            if objective == "oprd":
                bars.append(Bar(ratio_name(objective, "Δpeak", FLOOR, tokens), 1.03, ("update",)))
            else:
                bars.append(Bar(ratio_name(objective, "time", "plain", tokens), 1.0, ("update",)))
    return bars


BARS = (
    *_of_updates(),
    Bar(MATMUL_SHARE, 0.60, ("matmul", "update"), least=True, style=".1%"),
    Bar(PACKED, 1.0, ("packing",)),
    Bar(APART, 0.01, ("packing",), style=".1e"),  # bf16 gradients are 0.2 % from fp64's
    Bar(NATIVE, 5000, ("rollout",), least=True, style=",.0f"),
    Bar(SYNC, 0.05, ("rollout", "update"), style=".1%"),
    Bar(OTHER_PHASES, 0.05, ("flagship",), style=".1%"),
    Bar(MEMORY, 0.05, ("flagship",), style=".1%"),
)


def bars_of(parts: Collection[str], figures: Mapping[str, float]) -> list[Bar]:
    """The bars of these parts; of a bar that needs others too, only if it was measured."""
    return [bar for bar in BARS if bar.figure in figures or all(part in parts for part in bar.parts)]


def are_for(card: str) -> bool:
    """Whether the bars were set for this card."""
    return ENFORCED_ON.search(card) is not None
