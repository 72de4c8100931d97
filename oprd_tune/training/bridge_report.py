"""A bridge as a table of its layers, and as a figure of similarity against layer and against rank."""

from __future__ import annotations

from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from oprd_tune.modeling.bridge import Bridge


def as_table(bridge: Bridge) -> str:
    """How well the projections of each layer pair agree, and the mean cosine over layers at every rank."""
    lines = [f"\n  Bridge of rank {bridge.rank}, basis {bridge.plan['basis']}", ""]
    lines.append("  student  teacher   R² fitted  R² held out  cosine held out")
    for pair in bridge.pairs:
        fit = bridge.report[pair.student]
        lines.append(
            f"  {pair.student:>7}  {pair.teacher:>7}  {fit.r_squared:>10.3f}  {fit.held_out_r_squared:>11.3f}"
            f"  {fit.cosine:>15.3f}"
        )
    by_rank = ", ".join(f"{rank}: {cosine:.3f}" for rank, cosine in mean_cosines(bridge).items())
    return "\n".join([*lines, "", f"  mean cosine by rank  {by_rank}", ""])


def mean_cosines(bridge: Bridge) -> dict[int, float]:
    """The held-out cosine averaged over layers, by rank."""
    fits = list(bridge.report.values())
    return {rank: fmean(fit.cosine_by_rank[rank] for fit in fits) for rank in fits[0].cosine_by_rank}


def bridge_figure(bridge: Bridge) -> Figure:
    """The similarity of each layer at the bridge's rank, and its mean over layers against rank."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    by_layer, by_rank = figure.subplots(1, 2)
    layers = [pair.student for pair in bridge.pairs]
    fits = [bridge.report[layer] for layer in layers]
    by_layer.plot(layers, [fit.cosine for fit in fits], marker="o", label="cosine, held out")
    by_layer.plot(layers, [fit.held_out_r_squared for fit in fits], marker="s", label="R², held out")
    by_layer.plot(layers, [fit.r_squared for fit in fits], marker="s", linestyle=":", label="R², fitted rows")
    by_layer.set(xlabel="student layer", ylabel=f"agreement at rank {bridge.rank}")
    by_layer.xaxis.set_major_locator(MaxNLocator(integer=True))
    ranks = list(fits[0].cosine_by_rank)
    by_rank.plot(ranks, list(mean_cosines(bridge).values()), marker="o", label="cosine")
    r_squared = [fmean(fit.r_squared_by_rank[rank] for fit in fits) for rank in ranks]
    by_rank.plot(ranks, r_squared, marker="s", label="R²")
    by_rank.axvline(bridge.rank, color="black", linestyle="--", linewidth=1, label=f"this bridge, {bridge.rank}")
    by_rank.set(xlabel="rank", ylabel="held out, mean over layers")
    by_rank.set_xscale("log", base=2)
    by_rank.set_xticks(ranks, labels=[str(rank) for rank in ranks], fontsize=7)
    for axes in (by_layer, by_rank):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
