"""Heat maps of a quantity of every layer, by step: trust ratio, parameter norm, update norm.

Every function writes a PNG and returns the figure. It returns None, and writes nothing, where the
records hold nothing to draw.
"""

import pathlib
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from optim_zoo.train.records import Floats, Records
from optim_zoo.train.sinks.plots.figure import log_ticks, new_figure, step_axis, widened, write


def trust_ratio(records: Records, path: pathlib.Path) -> Figure | None:
    """Draws the trust ratio of every layer and step as a heat map."""
    return _layer_map(records, "trust_ratio", "Trust ratio by layer", path)


def parameter_norm(records: Records, path: pathlib.Path) -> Figure | None:
    """Draws the parameter norm of every layer and step as a heat map."""
    return _layer_map(records, "parameter_norm", "Parameter norm by layer", path)


def update_norm(records: Records, path: pathlib.Path) -> Figure | None:
    """Draws the update norm of every layer and step as a heat map.

    Where there are trust ratios, of the layers that have one: the norm of the others is that of the
    whole step, learning rate included, and not to be compared with a direction's.
    """
    adapted, _ = records.layers("trust_ratio")
    return _layer_map(records, "update_norm", "Update norm by layer", path, adapted)


def _layer_map(
    records: Records, quantity: str, title: str, path: pathlib.Path, only: Sequence[str] = ()
) -> Figure | None:
    """Heat map: a row a layer, a column as wide as the steps it stands for, colour on a log scale.

    What a log scale cannot show, zero and NaN, is grey. `only`, where it names any, is the layers
    to draw.
    """
    names, values = records.layers(quantity)
    if only:
        kept = [i for i, name in enumerate(names) if name in set(only)]
        names, values = [names[i] for i in kept], values[kept]
    shown = np.ma.masked_where(~(np.isfinite(values) & (values > 0)), values)
    if shown.count() == 0:
        return None
    order = _grouped(names)
    labels = _shortened([names[i] for i in order])
    tall = len(labels) > 40
    row_height, font_size = (0.125, 6.5) if tall else (0.22, 8.0)
    label_width = max(map(len, labels)) * font_size * 0.6 / 72  # 0.6 em a letter, in inches.
    size = (6.5 + label_width, 1.7 + row_height * len(labels))
    figure, axes = new_figure(*size)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)

    low, high, extend = _colour_range(shown.compressed())
    mesh = axes.pcolormesh(
        _edges(records.layer_steps(quantity)),
        np.arange(len(labels) + 1) - 0.5,
        shown[order],
        norm=LogNorm(low, high),
        cmap=matplotlib.colormaps["viridis"].with_extremes(bad="0.82"),
    )
    axes.invert_yaxis()
    axes.set_yticks(range(len(labels)), labels, fontsize=font_size, parse_math=False)
    axes.set_ylabel("layer")
    axes.tick_params(axis="y", length=0)
    step_axis(axes)
    axes.tick_params(axis="x", top=tall, labeltop=tall)
    for row in _group_starts([names[i] for i in order]):
        axes.axhline(row - 0.5, color="white", lw=1)

    pad = 0.12 / figure.get_figheight()
    bar = figure.colorbar(mesh, ax=axes, location="top", aspect=60, pad=pad, extend=extend)
    ticks = log_ticks(low, high)
    bar.set_ticks(list(ticks), labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    grey = "; grey: zero or not finite" if np.ma.is_masked(shown) else ""
    bar.set_label(f"{quantity.replace('_', ' ')} (log scale{grey})", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return write(figure, path)


def _edges(steps: Floats) -> Floats:
    """Borders of the columns, (steps + 1,): half way between neighbours, as far out at the ends."""
    if steps.size == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _colour_range(values: Floats) -> tuple[float, float, str]:
    """Ends of the colour scale, and at which of them some values lie beyond.

    What is 4 times farther out than 99 of 100 values does not stretch the scale: one wild ratio
    would make all the others look alike.
    """
    smallest, largest = values.min(), values.max()
    low = max(smallest, np.quantile(values, 0.01, method="lower") / 4)
    high = min(largest, np.quantile(values, 0.99, method="higher") * 4)
    names = {(True, True): "both", (True, False): "min", (False, True): "max"}
    extend = names.get((bool(smallest < low), bool(largest > high)), "neither")
    if low == high:
        low, high = widened(low, high)
    return float(low), float(high), extend


_NUMBER = re.compile(r"\d+")
_KERNEL = re.compile(r"/kernel(?=(\[\d+\])?$)")


def _grouped(names: Sequence[str]) -> list[int]:
    """Order of the rows: leaves as in the file, layers 0, 1, 2, ... of one leaf together."""
    patterns = [_NUMBER.sub("#", name) for name in names]
    numbers = [tuple(map(int, _NUMBER.findall(name))) for name in names]
    first = {pattern: patterns.index(pattern) for pattern in set(patterns)}
    return sorted(range(len(names)), key=lambda i: (first[patterns[i]], numbers[i]))


def _group_starts(names: Sequence[str]) -> list[int]:
    """Rows, but the first, whose name differs in more than a number from the row before."""
    patterns = [_NUMBER.sub("#", name) for name in names]
    return [i for i in range(1, len(names)) if patterns[i] != patterns[i - 1]]


def _shortened(names: Sequence[str]) -> list[str]:
    """The names without a final `/kernel`, where they stay distinct, and without a common start."""
    without = [_KERNEL.sub("", name) for name in names]
    segments = [name.split("/") for name in (without if len(set(without)) == len(names) else names)]
    depth = min(map(len, segments)) - 1 if len(names) > 1 else 0
    common = next((i for i in range(depth) if len({path[i] for path in segments}) > 1), depth)
    return ["/".join(path[common:]) for path in segments]
