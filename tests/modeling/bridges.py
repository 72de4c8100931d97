"""Bridges for tests, fitted on random states that partly follow from each other."""

import torch

from oprd_tune.modeling.bridge import Belonging, Bridge, BridgePlan
from oprd_tune.modeling.moments import PairMoments
from oprd_tune.modeling.projectors import HeldOut, fit_projectors
from oprd_tune.ranks import Ranks
from oprd_tune.types import LayerPair

CPU = torch.device("cpu")
PAIRS = [LayerPair(1, 2), LayerPair(3, 2), LayerPair(4, 6)]
BELONGS = Belonging(
    student={"name": "small", "depth": 4, "width": 5, "fingerprint": "ab"},
    teacher={"name": "large", "depth": 6, "width": 7, "fingerprint": "cd"},
    conventions={"positions": "last_k", "positions_k": 20, "anchor": "predict", "own_tokens": False},
)


def make_bridge(pairs, width=5, teacher_width=7, *, rank=3, seed=0, belongs=BELONGS, **plan):
    """A bridge with its report."""
    plan = BridgePlan(rank=rank, **plan)
    generator = torch.Generator().manual_seed(seed)
    fits, new = {}, {}
    for pair in pairs:
        h = torch.randn(90, width, generator=generator) + 1
        g = h @ torch.randn(width, teacher_width, generator=generator) - 2
        g = g + torch.randn(90, teacher_width, generator=generator)
        moments = PairMoments(width, teacher_width, dtype=torch.float32, device=CPU)
        moments.add(h[:60], g[:60])
        fits[pair.student] = fit_projectors(moments, basis=plan.basis, ridge=plan.ridge)
        new[pair.student] = h[60:], g[60:]
    check = HeldOut(fits, rank)
    for layer, states in new.items():
        check.add(layer, *states)
    bridge = Bridge(pairs, rank, plan.fitting, belongs, check.report(Ranks()))
    for layer, fit in fits.items():
        bridge.set(layer, fit, device=CPU)
    return bridge


def identity_bridge(pairs, width):
    """Projections that subtract two different means and leave the rest as it is."""
    generator = torch.Generator().manual_seed(0)
    moments = PairMoments(width, width, dtype=torch.float64, device=CPU)
    h = torch.randn(50, width, generator=generator, dtype=torch.float64)
    moments.add(h, h + 4)
    fit = fit_projectors(moments, basis="pca")
    bridge = Bridge(pairs, width, BridgePlan(rank=width).fitting, BELONGS)
    for pair in pairs:
        bridge.set(pair.student, fit, device=CPU)
    return bridge
