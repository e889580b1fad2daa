"""The outlier monitor's pictures, each readable at a glance, as matplotlib figures (no window, no global state)."""

from matplotlib.figure import Figure
from torch import Tensor

from lit_actreg.quant.statistics import OUTLIER_RATIO


def channel_map(steps: list[int], channels: list[list[float]], where: str) -> Figure:
    """Heat map of mean |x|: one column a snapshot, one row a channel, brightest on top, as of the last snapshot."""
    order = sorted(range(len(channels[-1])), key=lambda c: -channels[-1][c])
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        [[snapshot[c] for snapshot in channels] for c in order], aspect="auto", interpolation="nearest", cmap="magma"
    )
    shown = range(0, len(steps), max(1, len(steps) // 8))
    axes.set_xticks(list(shown), [str(steps[i]) for i in shown])
    axes.set(xlabel="optimizer step", ylabel="channel, by its last mean |x|", title=f"mean |x| of {where}")
    figure.colorbar(image, label="mean |x|")
    return figure


def outlier_shares(steps: list[int], shares: list[list[list[float]]], sites: list[str]) -> Figure:
    """Share of outlier channels (mean |x| > 6 × the layer's) over training: a panel a site, a line a block."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flatten()
    num_layers = len(shares[-1])
    for s, (axes, site) in enumerate(zip(panels, sites, strict=True)):
        for layer in range(num_layers):
            shade = 0.9 * (1 - layer / max(1, num_layers - 1))
            values = [100 * snapshot[layer][s] for snapshot in shares]
            axes.plot(steps, values, color=(shade, 0.3, 1 - shade), label=f"block {layer}", linewidth=1)
        axes.set(title=site, xlabel="optimizer step")
    panels[0].set_ylabel("outlier channels, %")
    panels[-1].legend(fontsize=6)
    return figure


def value_histogram(values: Tensor, layer_mean_abs: float, where: str) -> Figure:
    """Values of the largest channel: shifted (a bump away from 0) or scaled (wide around 0)?"""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(values.numpy(), bins=100, color="tab:blue")
    axes.axvline(values.mean().item(), color="tab:orange", label=f"its mean, {values.mean().item():.2f}")
    for sign in (-1, 1):
        label = f"±{OUTLIER_RATIO:.0f} × the layer's mean |x|" if sign == 1 else None
        axes.axvline(sign * OUTLIER_RATIO * layer_mean_abs, color="tab:red", linestyle="--", label=label)
    axes.set(xlabel="x", ylabel="tokens", title=f"largest channel of {where}")
    axes.legend()
    return figure
