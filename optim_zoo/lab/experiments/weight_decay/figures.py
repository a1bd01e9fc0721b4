"""The plots: what remains of two coordinates, and the maps of the held-out loss and accuracy."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from optim_zoo.lab.experiments.drawing import write_small
from optim_zoo.lab.experiments.weight_decay import two_coordinates
from optim_zoo.lab.experiments.weight_decay.maps import Map
from optim_zoo.train.sinks.plots.figure import (
    BLUE,
    DPI,
    PALE_BLUE,
    VERMILION,
    line_figure,
    log_ticks,
    write,
)

PALE_VERMILION = "#F6C9A6"


def draw_two_coordinates(kept: Mapping[str, np.ndarray], path: Path) -> Figure:
    """Draws what Adam with L2 and AdamW leave of the two coordinates."""
    figure, axes = line_figure(
        "Decay of two coordinates whose gradients have the scales 1 and 100",
        "share of the parameter that remains",
        7.5,
        3.6,
    )
    steps = np.arange(1, two_coordinates.STEPS + 1)
    # The three lines that coincide have different widths, so that all of them can be seen.
    styles = (
        ("Adam, L2", 0, "-", PALE_VERMILION, 8.0),
        ("Adam, L2", 1, "-", VERMILION, 2.0),
        ("AdamW", 0, "-", PALE_BLUE, 4.5),
        ("AdamW", 1, "--", BLUE, 1.5),
    )
    for name, column, line, colour, width in styles:
        label = f"{name}, gradient scale {two_coordinates.SCALES[column]:g}"
        axes.plot(steps, kept[name][:, column], line, color=colour, lw=width, label=label)
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    return write(figure, path)


def draw_maps(maps: Sequence[Map], path: Path) -> Figure:
    """Draws the mean loss (above) and the mean accuracy (below) of every form of decay.

    A frame marks the best decay at each learning rate, by the loss; the red one is the best cell.
    """
    figure = Figure(figsize=(3.3 * len(maps) + 1, 6.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(maps), squeeze=False)
    losses = [np.where(np.isfinite(one.mean()), one.mean(), np.nan) for one in maps]
    low, high = float(np.nanmin(losses)), float(np.nanmax(losses))
    best = max(float(one.accuracy.mean(-1).max()) for one in maps)
    scales = (
        ScalarMappable(LogNorm(low, max(high, low * 1.01)), "viridis_r"),
        ScalarMappable(Normalize(100 * best - 15, 100 * best), "viridis"),
    )
    for column, (one, loss) in enumerate(zip(maps, losses, strict=True)):
        _draw(grid[0, column], one, loss, "{:.2f}", scales[0])
        _draw(grid[1, column], one, 100 * one.accuracy.mean(-1), "{:.0f}", scales[1])
        grid[0, column].set_title(one.form.title, fontsize=11)
    bar = figure.colorbar(scales[0], ax=list(grid[0]), label="held-out loss (nats)", pad=0.01)
    ticks = log_ticks(low, high)
    bar.set_ticks(list(ticks), labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    label = "held-out accuracy (%)"
    figure.colorbar(scales[1], ax=list(grid[1]), label=label, pad=0.01, extend="min")
    return write_small(figure, path)


def _draw(axes: Axes, one: Map, values: np.ndarray, pattern: str, scale: ScalarMappable) -> None:
    """Draws one map with its values, and frames the best decay at each learning rate."""
    colours = scale.to_rgba(np.ma.masked_invalid(values))  # white where a run diverged
    axes.imshow(colours, origin="lower", aspect="auto")
    for (decay, rate), value in np.ndenumerate(values):
        text = "-" if not np.isfinite(value) else pattern.format(value)
        light = colours[decay, rate, :3] @ [0.3, 0.6, 0.1] > 0.5 or not np.isfinite(value)
        ink = "black" if light else "white"
        axes.annotate(text, (rate, decay), ha="center", va="center", fontsize=7, color=ink)
        if decay == one.mean()[:, rate].argmin():
            colour = VERMILION if (decay, rate) == one.best() else "black"
            corner = (rate - 0.44, decay - 0.44)
            axes.add_patch(Rectangle(corner, 0.88, 0.88, fill=False, edgecolor=colour, lw=1.8))
    axes.set_xticks(np.arange(len(one.scale.rates)), [f"{x:g}" for x in one.scale.rates])
    axes.set_yticks(np.arange(len(one.form.decays)), [f"{x:g}" for x in one.form.decays])
    axes.tick_params(labelsize=8, length=0)
    axes.set_xlabel("learning rate", fontsize=9)
    axes.set_ylabel(one.form.decay, fontsize=9)
