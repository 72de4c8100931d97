"""Sums and counts of a step, fetched from the device once."""

from __future__ import annotations

import torch
from torch import Tensor

from oprd_tune.losses.composite import CompositeStream
from oprd_tune.losses.hidden_mse import LayerStream
from oprd_tune.losses.token_loss import Measures
from oprd_tune.metrics.names import check_names
from oprd_tune.ranks import Ranks
from oprd_tune.types import Rollout, Selection


class MetricBuffer:
    """Collects a step's means as (sum, count) pairs, and single values, without waiting for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}
        self._values: dict[str, float] = {}

    def add(self, name: str, total: Tensor, count: float) -> None:
        """Add to a mean: its sum, and how many it sums over."""
        total = total.detach().to(torch.float64)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def set(self, name: str, value: float) -> None:
        """Set a value that is one already."""
        self._values[name] = value

    def add_rollout(self, rollout: Rollout) -> None:
        """Add what the rollout itself tells."""
        rows, tokens = len(rollout), rollout.response_tokens
        self.add("rollout/response_tokens", rollout.response_mask_BS.sum(), rows)
        self.add("rollout/truncated_share", rollout.truncated_B.sum(), rows)
        self.add("rollout/entropy", -rollout.sampler_logprobs_BS.sum(), tokens)
        if rollout.reading is not None:
            self.add("rollout/matched_share", torch.tensor(rollout.matched_tokens), tokens)
        if (gap := rollout.logprob_gap) is not None:
            self.set("rollout/logprob_gap", gap.mean)
            self.set("rollout/logprob_gap_max", gap.largest)
            self.set("rollout/proof_seconds", gap.seconds)

    def add_stream(self, stream: LayerStream, selection: Selection) -> None:
        """Add what the taps measured in one microbatch."""
        for layer, total in stream.squared_errors.items():
            self.add(f"layers/mse_{layer:02d}", total, len(selection))
        for layer, total in stream.cosines.items():
            self.add(f"layers/cosine_{layer:02d}", total, len(selection))
        tokens_4 = torch.bincount(selection.quarter_T, minlength=4)
        for quarter, (total, tokens) in enumerate(zip(stream.quarter_cosines, tokens_4.tolist(), strict=True)):
            self.add(f"positions/cosine_quarter_{quarter + 1}", total, tokens * len(stream.cosines))

    def add_composite(self, stream: CompositeStream, selection: Selection) -> None:
        """Add what the parts of a composite measured in one microbatch."""
        token_parts = [part for part in stream.streams.values() if not isinstance(part, LayerStream)]
        for name, part in stream.streams.items():
            if isinstance(part, LayerStream):
                self.add_stream(part, selection)
            else:
                self.add_measures(part.measures, part.count, part=name if len(token_parts) > 1 else None)

    def add_measures(self, measures: Measures, count: int, *, part: str | None = None) -> None:
        """Add sums over `count` tokens; those of one `part` among several under its name."""
        for name, total in measures.sums.items():
            self.add(name if part is None else name.replace("token/", f"token/{part}/"), total, count)

    def add_times(self, seconds: dict[str, float], sampled: int, read: int) -> None:
        """Add the step's seconds by phase, and the speeds that follow from them.

        Args:
            seconds: of this rank.
            sampled: response tokens, of all ranks.
            read: prompt and response tokens, of all ranks.
        """
        total = sum(seconds.values())
        for phase, value in {**seconds, "step": total}.items():
            self.set(f"time/{phase}", value)
        for phase, tokens in (("rollout", sampled), ("teacher", read), ("student", read)):
            if phase in seconds:
                self.set(f"speed/{phase}", tokens / seconds[phase])
        self.set("speed/step", sampled / total)

    def finish(self, ranks: Ranks) -> dict[str, float]:
        """The step's metrics, the same on all ranks; the buffer is empty afterwards. A mean over nothing is left out.

        Sums and counts are added over ranks. Of single values the first rank's count, of memory the largest. It takes
        one collective, so every rank must have added the same names.
        """
        sums = [self._sums[name].to(ranks.device) for name in self._counts]
        rest = [*self._counts.values(), *self._values.values()]
        packed_N = torch.cat(
            [
                torch.stack([*sums]) if sums else torch.empty(0, dtype=torch.float64, device=ranks.device),
                torch.tensor(rest, dtype=torch.float64, device=ranks.device),
            ]
        )
        rows_WN = ranks.gather(packed_N).cpu()
        totals, counts, _ = rows_WN.sum(0).split([len(sums), len(sums), len(self._values)])
        means = zip(self._counts, totals.tolist(), counts.tolist(), strict=True)
        values_WN = rows_WN[:, 2 * len(sums) :]
        finished = {name: total / count for name, total, count in means if count}
        for place, name in enumerate(self._values):
            finished[name] = (values_WN[:, place].max() if name.startswith("memory/") else values_WN[0, place]).item()
        check_names(finished)
        self.__init__()  # type: ignore[misc]
        return finished
