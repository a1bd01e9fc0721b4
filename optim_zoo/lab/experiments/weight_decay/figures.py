"""The plots: what remains of two coordinates, and the maps of the held-out loss and accuracy."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from optim_zoo.lab.experiments.weight_decay import two_coordinates
from optim_zoo.lab.experiments.weight_decay.maps import Map
from optim_zoo.train.sinks.plots.figure import BLUE, DPI, VERMILION, line_figure, write


def draw_two_coordinates(kept: Mapping[str, np.ndarray], path: Path) -> Figure:
    """Draws what Adam with L2 and AdamW leave of the two coordinates."""
    figure, axes = line_figure(
        "Decay of two coordinates whose gradients have the scales 1 and 100",
        "share of the parameter that remains",
        7.5,
        3.6,
    )
    steps = np.arange(1, two_coordinates.STEPS + 1)
    styles = {"Adam, L2": (VERMILION, 2.0), "AdamW": (BLUE, 2.0)}
    for name, (colour, width) in styles.items():
        for column, line in enumerate(("-", "--")):
            scale = two_coordinates.SCALES[column]
            label = f"{name}, gradient scale {scale:g}"
            axes.plot(steps, kept[name][:, column], line, color=colour, lw=width, label=label)
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    return write(figure, path)


def draw_maps(maps: Sequence[Map], path: Path) -> Figure:
    """Draws the mean loss (above) and the mean accuracy (below) of every form of decay.

    A frame marks the best decay at each learning rate, by the loss; the red one is the best cell.
    """
    figure = Figure(figsize=(3.6 * len(maps) + 1, 7), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(maps), squeeze=False)
    losses = [np.where(np.isfinite(one.mean()), one.mean(), np.nan) for one in maps]
    low, high = float(np.nanmin(losses)), float(np.nanmax(losses))
    colours = matplotlib.colormaps["viridis_r"].with_extremes(bad="0.82")
    for column, (one, loss) in enumerate(zip(maps, losses, strict=True)):
        upper, lower = grid[0, column], grid[1, column]
        image = upper.pcolormesh(loss, norm=LogNorm(low, max(high, low * 1.01)), cmap=colours)
        _describe(upper, one, loss, "{:.2f}")
        accuracy = one.accuracy.mean(-1)
        second = lower.pcolormesh(accuracy, vmin=0, vmax=1, cmap="viridis")
        _describe(lower, one, 100 * accuracy, "{:.0f}")
        upper.set_title(one.form.title, fontsize=11)
    figure.colorbar(image, ax=list(grid[0]), label="held-out loss (nats)", pad=0.01)
    figure.colorbar(second, ax=list(grid[1]), label="held-out accuracy", pad=0.01)
    return write(figure, path)


def _describe(axes: Axes, one: Map, values: np.ndarray, pattern: str) -> None:
    best = one.best()
    for (decay, rate), value in np.ndenumerate(values):
        where = (rate + 0.5, decay + 0.5)
        text = "-" if not np.isfinite(value) else pattern.format(value)
        axes.annotate(text, where, ha="center", va="center", fontsize=7, color="white")
        if decay == one.mean()[:, rate].argmin():
            colour = VERMILION if (decay, rate) == best else "white"
            corner = (rate + 0.06, decay + 0.06)
            axes.add_patch(Rectangle(corner, 0.88, 0.88, fill=False, edgecolor=colour, lw=1.8))
    axes.set_xticks(np.arange(len(one.scale.rates)) + 0.5, [f"{x:g}" for x in one.scale.rates])
    axes.set_yticks(np.arange(len(one.form.decays)) + 0.5, [f"{x:g}" for x in one.form.decays])
    axes.tick_params(labelsize=8, length=0)
    axes.set_xlabel("learning rate", fontsize=9)
    axes.set_ylabel(one.form.decay, fontsize=9)
