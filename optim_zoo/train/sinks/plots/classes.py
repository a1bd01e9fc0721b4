"""Plots of the last evaluation by class: a value for each class, and a matrix of classes.

Every function writes a PNG and returns the figure. It returns None, and writes nothing, where the
records hold nothing to draw.
"""

import pathlib

import numpy as np
from matplotlib.figure import Figure

from optim_zoo.train.records import Records
from optim_zoo.train.sinks.base import shown_name
from optim_zoo.train.sinks.plots.figure import BLUE, new_figure, write


def by_class(records: Records, metric: str, path: pathlib.Path) -> Figure | None:
    """Draws the last value of ``<metric>/<class>`` as one bar for each class."""
    values = _last(records, metric, slashes=1)
    if not values:
        return None
    figure, axes = new_figure(5.6, 1.0 + 0.26 * len(values))
    text = shown_name(metric).replace("_", " ")
    axes.set_title(f"Held-out {text} by class", loc="left", fontsize=12)
    places = np.arange(len(values))
    bars = axes.barh(places, list(values.values()), color=BLUE, height=0.7)
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.set_yticks(places, list(values), parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(1.0, *values.values()))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return write(figure, path)


def matrix(records: Records, metric: str, path: pathlib.Path) -> Figure | None:
    """Draws the last values of ``<metric>/<row>/<column>`` as a matrix of percentages.

    The class ``O``, the words outside of every class, is the last one.
    """
    values = _last(records, metric, slashes=2)
    if not values:
        return None
    cells = {tuple(name.split("/")): value for name, value in values.items()}
    names = sorted(dict.fromkeys(row for row, _ in cells), key=lambda name: name == "O")
    table = np.array([[cells.get((row, column), 0.0) for column in names] for row in names])
    return confusion(table, names, f"Held-out {metric}: percent of the words of a class", path)


def confusion(table: np.ndarray, names: list[str], title: str, path: pathlib.Path) -> Figure:
    """Draws a matrix of fractions, ``(classes, classes)``, whose rows are the true classes."""
    size = 2.2 + 0.42 * len(names)
    figure, axes = new_figure(size + 0.6, size)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    # The root shows small fractions, which are the errors.
    axes.imshow(np.sqrt(np.clip(table, 0, 1)), cmap="Blues", vmin=0, vmax=1)
    places = range(len(names))
    axes.set_xticks(places, names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(places, names, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(table):
        if value >= 0.0005:
            text = f"{100 * value:.{0 if value >= 0.0995 else 1}f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7,
                      color="white" if value > 0.3 else "black")  # fmt: skip
    return write(figure, path)


def _last(records: Records, metric: str, slashes: int) -> dict[str, float]:
    """Returns the last value of each name below ``metric/`` that has so many slashes."""
    return {
        name.partition("/")[2]: float(values[-1])
        for name, (_, values) in records.held_out.items()
        if name.startswith(f"{metric}/") and name.count("/") == slashes and len(values)
    }
