"""How far training moves a tied LM head. A loss on hidden states does not see that movement."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtune.modules import TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear

from oprd_tune.ranks import Ranks

_DRIFT_ROWS = 1024  # measure at most that many rows


class TiedHeadDrift:
    """Measures how far an embedding that also is the LM head has moved, on evenly spaced rows.

    The constructor takes the student before training.
    """

    def __init__(self, model: TransformerDecoder, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self._start_RD: Tensor | None = None
        if isinstance(model.output, TiedLinear) and model.tok_embeddings.weight.requires_grad:
            rows = model.tok_embeddings.weight.shape[0]
            self._measured = range(0, rows, -(-rows // _DRIFT_ROWS))
            own_RD, places_R = self._own_rows(model)
            start_RD = own_RD.new_zeros(len(self._measured), own_RD.shape[1])
            start_RD[places_R] = own_RD
            self._start_RD = self._ranks.gather(start_RD.flatten()).sum(0).view_as(start_RD).to(own_RD.device)

    def _own_rows(self, model: TransformerDecoder) -> tuple[Tensor, Tensor]:
        """The measured rows that lie on this rank, in fp32, and their places among all measured rows."""
        weight_VD = model.tok_embeddings.weight.detach()
        first = 0
        if isinstance(weight_VD, DTensor):  # FSDP cuts the rows into equal chunks; the last chunk may be shorter
            first = self._ranks.rank * -(-weight_VD.shape[0] // self._ranks.world_size)
            weight_VD = weight_VD.to_local()
        measured = self._measured
        rows_R = torch.arange(measured.start, measured.stop, measured.step, device=weight_VD.device)
        places_R = ((rows_R >= first) & (rows_R < first + len(weight_VD))).nonzero(as_tuple=True)[0]
        return weight_VD[rows_R[places_R] - first].float(), places_R

    def measure(self, model: TransformerDecoder) -> float | None:
        """‖W − W₀‖ / ‖W₀‖; None for a head that is untied or frozen."""
        if self._start_RD is None:
            return None
        own_RD, places_R = self._own_rows(model)
        (moved,) = self._ranks.total([(own_RD - self._start_RD[places_R]).double().square().sum().item()])
        return (moved / self._start_RD.double().square().sum().item()) ** 0.5

    def state_dict(self) -> dict[str, Tensor | None]:
        """The rows before training, so that a resumed run measures from them too."""
        return {"start": self._start_RD}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Measure from the rows that a checkpoint holds."""
        if self._start_RD is not None:
            self._start_RD.copy_(state["start"])
