"""Heat maps of a quantity per layer and step: trust ratio, parameter norm, update norm.

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

    If there are trust ratios, only the layers that have one are drawn. Their update norm is that of
    the direction; that of the other layers includes the learning rate and cannot be compared.
    """
    adapted, _ = records.layers("trust_ratio")
    return _layer_map(records, "update_norm", "Update norm by layer", path, adapted)


def _layer_map(
    records: Records, quantity: str, title: str, path: pathlib.Path, only: Sequence[str] = ()
) -> Figure | None:
    """Draws one row per layer and one column per logged step, with colours on a log scale.

    Values that a log scale cannot show, zero and NaN, are grey. ``only`` restricts the rows to the
    layers that it names; if it is empty, all layers are drawn.
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
    label_width = max(map(len, labels)) * font_size * 0.6 / 72  # 0.6 em per letter, in inches
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
    """Returns the column borders, (steps + 1,): midpoints, and the same distance at both ends."""
    if steps.size == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _colour_range(values: Floats) -> tuple[float, float, str]:
    """Returns both ends of the colour scale, and at which ends there are values beyond it.

    The scale covers 98 % of the values and a factor of 4 on either side. Without this limit one
    extreme ratio would give all other layers the same colour.
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
    """Returns the order of the rows: as in the file, with the layers of one leaf together."""
    patterns = [_NUMBER.sub("#", name) for name in names]
    numbers = [tuple(map(int, _NUMBER.findall(name))) for name in names]
    first = {pattern: patterns.index(pattern) for pattern in set(patterns)}
    return sorted(range(len(names)), key=lambda i: (first[patterns[i]], numbers[i]))


def _group_starts(names: Sequence[str]) -> list[int]:
    """Returns the rows whose name differs from the row before in more than a number."""
    patterns = [_NUMBER.sub("#", name) for name in names]
    return [i for i in range(1, len(names)) if patterns[i] != patterns[i - 1]]


def _shortened(names: Sequence[str]) -> list[str]:
    """Returns the names without ``/kernel``, if they stay distinct, and without a common prefix."""
    without = [_KERNEL.sub("", name) for name in names]
    segments = [name.split("/") for name in (without if len(set(without)) == len(names) else names)]
    depth = min(map(len, segments)) - 1 if len(names) > 1 else 0
    common = next((i for i in range(depth) if len({path[i] for path in segments}) > 1), depth)
    return ["/".join(path[common:]) for path in segments]
