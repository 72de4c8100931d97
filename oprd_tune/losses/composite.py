"""Several losses on one student and one teacher forward pass (Eq. 7 of arXiv 2606.06021: L_OPD + μ · L_OPRD)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from oprd_tune.config.checks import check_not_negative
from oprd_tune.errors import ConfigError
from oprd_tune.losses.diagnostics import Probe
from oprd_tune.losses.hidden_mse import HiddenStateLoss, LayerStream
from oprd_tune.losses.masking import StateSelector
from oprd_tune.losses.token_loss import TokenLoss, TokenStream
from oprd_tune.metrics.step import Metrics
from oprd_tune.modeling.heads import Heads
from oprd_tune.protocols import Projections, RolloutEngine
from oprd_tune.selection import ResponseTokens, Selection
from oprd_tune.types import LayerPair, Rollout, TeacherTargets

Loss = HiddenStateLoss | TokenLoss


class Composite:
    """loss = Σ_parts weight · sum_part / N_part: each part is divided by its own count.

    Args:
        parts: losses by name: any number of token losses, and at most one on hidden states.
        weights: weights by the same names; a part without one has weight 1.

    Raises:
        ConfigError: if there is no part, a part is not a loss, two parts are on hidden states, a name is not allowed,
            or a weight is negative or belongs to no part.
    """

    def __init__(self, parts: Mapping[str, Loss], weights: Mapping[str, float] | None = None) -> None:
        weights = weights or {}
        if not parts:
            raise ConfigError("loss.parts is empty; give at least one loss, such as `parts: {opd: {_component_: …}}`")
        if not isinstance(parts, Mapping) or not isinstance(weights, Mapping):
            raise ConfigError(f"loss.parts maps names to losses, loss.weights to numbers; got {parts!r}, {weights!r}")
        for name, part in parts.items():
            if not re.fullmatch(r"\w+", name) or name == "total":
                raise ConfigError(f"loss.parts has {name!r}; a name is letters, digits and _, and not `total`")
            if not isinstance(part, (HiddenStateLoss, TokenLoss)):
                raise ConfigError(f"loss.parts.{name} is no loss but {part!r}; give it a `_component_`")
        if unknown := sorted(set(weights) - set(parts)):
            raise ConfigError(f"loss.weights names {', '.join(unknown)}; the parts are {', '.join(parts)}")
        for name, weight in weights.items():
            check_not_negative(f"loss.weights.{name}", weight)
        hidden = [part for part in parts.values() if isinstance(part, HiddenStateLoss)]
        if len(hidden) > 1:
            raise ConfigError("loss.parts has more than one loss on hidden states; there may be one")
        self.parts = dict(parts)
        self.weights = {name: float(weights.get(name, 1.0)) for name in parts}
        self.hidden = hidden[0] if hidden else None
        self.token_losses = {name: part for name, part in parts.items() if isinstance(part, TokenLoss)}

    @property
    def sampler_top_k(self) -> int:
        """How many of the sampler's most probable tokens the parts need with the rollout."""
        return max((part.sampler_top_k for part in self.token_losses.values()), default=0)

    @property
    def compares_tokens(self) -> bool:
        """Whether a part compares next tokens with the teacher's; not so an anchor or a reward beside hidden states."""
        return self.hidden is None or any(part.reads_teacher for part in self.token_losses.values())

    def check(self, vocabulary: int, engine: RolloutEngine, *, references: bool = False) -> None:
        """As in `TokenLoss`, for each part. With `references`, some responses are not the student's own."""
        parts = list(self.token_losses.values())
        for part in parts:
            part.check(vocabulary, engine)
            if part.reads_references_alone and not references:
                raise ConfigError(
                    f"{type(part).__name__} reads reference answers alone, and there are none; set reference_share"
                )
        only_samples = self.hidden is None and all(part.needs_samples for part in parts)
        blind = next((part for part in parts if part.sampler_top_k or only_samples), None)
        if references and blind is not None:
            raise ConfigError(
                f"reference_share: {type(blind).__name__} needs what the sampler says of each token, and reference "
                "answers are not sampled; set it to 0, take a loss that compares whole distributions or states, or add "
                "ReferenceCrossEntropy, which reads them"
            )

    def counts(self, rollout: Rollout, select: StateSelector) -> list[int]:
        """N of each part: the selected states for a hidden-state loss, the response tokens that a token loss reads."""
        tokens, selection = select.tokens(rollout), select(rollout)
        return [part.count(tokens) if isinstance(part, TokenLoss) else selection.count for part in self.parts.values()]

    def stream(
        self,
        targets: TeacherTargets,
        tokens: ResponseTokens,
        selection: Selection,
        *,
        heads: Heads | None,
        pairs: Sequence[LayerPair],
        bridge: Projections | None = None,
        probe: Probe | None = None,
    ) -> CompositeStream:
        """Start one microbatch. A `probe` also gets the final state; most steps have none.

        Token losses read `tokens` and `heads`. A hidden-state loss reads `selection`, `pairs` and `bridge`.
        """
        streams: dict[str, LayerStream | TokenStream] = {}
        for name, part in self.parts.items():
            if isinstance(part, HiddenStateLoss):
                streams[name] = part.stream(pairs, targets.states, selection, bridge)
            else:
                assert heads is not None
                assert targets.final_TC is not None or not part.reads_teacher
                final_TC = tokens.tokens_T.new_empty(len(tokens), 0) if targets.final_TC is None else targets.final_TC
                streams[name] = part.stream(heads, final_TC, tokens)
        return CompositeStream(streams, self.weights, probe)

    def compile(self) -> None:
        """As in `HiddenStateLoss` and `TokenLoss`, for each part."""
        for part in self.parts.values():
            part.compile()

    def waiting_bytes(self, vocabulary: int, width: int) -> int:
        """As in `TokenLoss`, of all parts together."""
        return sum(part.waiting_bytes(vocabulary, width) for part in self.token_losses.values())

    def fit(self, room: int, vocabulary: int, width: int) -> None:
        """As in `TokenLoss`, for each part, in the room that is left beside the gradients that wait."""
        room -= self.waiting_bytes(vocabulary, width)
        for part in self.token_losses.values():
            part.fit(room, vocabulary, width)

    def state_dict(self) -> dict[str, object]:
        """State of the hidden-state loss, if there is one; token losses have none."""
        return self.hidden.state_dict() if self.hidden is not None else {}

    def load_state_dict(self, state: Mapping[str, dict[int, float]]) -> None:
        if self.hidden is not None:
            self.hidden.load_state_dict(state)


def as_composite(loss: Loss | Composite) -> Composite:
    """A composite unchanged, or a single loss as a composite of one part. Raises ConfigError for anything else."""
    if isinstance(loss, Composite):
        return loss
    if not isinstance(loss, (HiddenStateLoss, TokenLoss)):
        raise ConfigError(f"loss is {loss!r}, none of the losses in oprd_tune.losses nor derived from one")
    return Composite({"loss": loss})


class CompositeStream:
    """One microbatch. Call it with each of `layers`, the student layers to tap, in ascending order.

    The call with the last layer returns each part's sum times its weight, [parts], with a graph. It also completes
    `metrics`, those of all parts and the probe. If several parts are token losses, theirs are named `token/<part>/…`.
    """

    def __init__(
        self, streams: Mapping[str, LayerStream | TokenStream], weights: Mapping[str, float], probe: Probe | None
    ) -> None:
        self._streams, self._weights, self._probe = streams, weights, probe
        self.layers = sorted(set().union(*(stream.layers for stream in streams.values())))
        self.metrics = Metrics()

    def __call__(self, layer: int, state_BSD: Tensor) -> Tensor:
        """Give the state to the parts that read this layer; return the weighted sums after the last layer."""
        for stream in self._streams.values():
            if layer in stream.layers:
                stream(layer, state_BSD)
        if layer < self.layers[-1]:
            return state_BSD
        if self._probe is not None:
            self._probe(state_BSD)
        self._collect_metrics()
        totals = {name: stream.total for name, stream in self._streams.items()}
        return torch.stack([self._weights[name] * total for name, total in totals.items() if total is not None])

    def _collect_metrics(self) -> None:
        token_parts = [name for name, stream in self._streams.items() if isinstance(stream, TokenStream)]
        for name, stream in self._streams.items():
            prefix = f"token/{name}/" if len(token_parts) > 1 and name in token_parts else "token/"
            self.metrics.merge(stream.metrics, partial(_renamed, prefix))
        if self._probe is not None:
            self.metrics.merge(self._probe.metrics)


def _renamed(prefix: str, metric: str) -> str:
    return metric.replace("token/", prefix)
