"""RMS norms that PyTorch can run in one kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torchtune.modules import RMSNorm, TransformerDecoder


class FusedRMSNorm(RMSNorm):
    """torchtune's norm, with input and weight of one dtype: y = scale · x / √(mean(x²) + eps), formed in fp32.

    torchtune converts the input to fp32 first. Beside a bf16 weight, PyTorch then has no fused kernel: it runs
    several, and keeps copies in fp32 for the backward pass. The fused kernel computes in fp32 too, and rounds y once.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width], in x's dtype."""
        if x.dtype != self.scale.dtype:
            return super().forward(x)
        return F.rms_norm(x, self.normalized_shape, self.scale, self.eps)


def fuse_norms(model: TransformerDecoder) -> TransformerDecoder:
    """Put a `FusedRMSNorm` with the same weight in the place of each of torchtune's norms; returns the model."""
    norm: Any
    for part in list(model.modules()):
        for name, norm in part.named_children():
            if type(norm) is RMSNorm:
                fused = FusedRMSNorm(norm.normalized_shape[0], norm.eps)
                fused.scale = norm.scale
                setattr(part, name, fused)
    return model
