"""Helpers that every plot uses: empty figures, axes, ticks and writing a PNG."""

import io
import pathlib
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from optim_zoo.train.files import replace_file
from optim_zoo.train.records import Floats

DPI = 130

# Blue and vermilion of the palette by Okabe and Ito, which colour-blind readers can tell apart.
BLUE, PALE_BLUE, VERMILION, GREY = "#0072B2", "#A6CEE3", "#D55E00", "#555555"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Returns an empty figure, without matplotlib's global state. Sizes are in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.tick_params(labelsize=9)
    return figure, axes


def line_figure(title: str, ylabel: str, width: float, height: float) -> tuple[Figure, Axes]:
    """Returns an empty line plot over steps. Sizes are in inches."""
    figure, axes = new_figure(width, height)
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_ylabel(ylabel)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(color="0.9", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    step_axis(axes)
    return figure, axes


def step_axis(axes: Axes) -> None:
    """Labels the horizontal axis with steps."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def write(figure: Figure, path: pathlib.Path) -> Figure:
    """Writes a figure as PNG, and returns it."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    replace_file(path, content.getvalue())
    return figure


def finite(columns: Mapping[str, tuple[Floats, Floats]], name: str) -> tuple[Floats, Floats]:
    """Returns steps and values of a column, without values that are not finite."""
    steps, values = columns.get(name, (np.empty(0), np.empty(0)))
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def widened(low: float, high: float) -> tuple[float, float]:
    """Returns two positive limits, each moved outwards by 10 %, so that they are never equal."""
    return float(low) / 1.1, float(high) * 1.1


def log_ticks(low: float, high: float) -> Floats:
    """Returns at most ten round values within a positive range, for a log scale."""
    powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    if high > 1e3 * low:
        ticks = 10.0 ** powers[:: -(-powers.size // 10)]
    else:
        ticks = np.outer(10.0**powers, [1, 2, 5]).ravel()
    ticks = ticks[(low <= ticks) & (ticks <= high)]
    if ticks.size < 3:  # Less than a decade: evenly spaced round values.
        ticks = np.asarray(MaxNLocator(5).tick_values(low, high))
        ticks = ticks[(low <= ticks) & (ticks <= high)]
    return ticks
