"""The plots of a sweep. Each function writes a PNG and returns the figure, or None without data."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, StrMethodFormatter

from optim_zoo.lab.comparisons import Curve, Group
from optim_zoo.lab.fits import Fit
from optim_zoo.train.records import Floats
from optim_zoo.train.sinks.plots.figure import DPI, GREY, write

Steps = Mapping[str, Mapping[int, Sequence[float]]]
"""Label of the optimizer -> batch size -> steps to the target, one for each seed."""


def _colours(groups: Sequence[Group]) -> dict[str, tuple[float, ...]]:
    """Returns a colour for each optimizer: those of Okabe and Ito first, then others."""
    first = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    labels = list(dict.fromkeys(group.label for group in groups))
    more = matplotlib.colormaps["tab20"]
    chosen = [
        matplotlib.colors.to_rgb(first[i]) if i < len(first) else more(i % 20)[:3]
        for i in range(len(labels))
    ]
    return dict(zip(labels, chosen, strict=True))


def _panels(rows: int, columns: int, title: str, width: float = 4.0) -> tuple[Figure, list[Axes]]:
    """Returns a figure with a grid of axes, row by row."""
    size = (width * columns, 3.1 * rows + 0.8)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(rows * columns)]
    for each in axes:
        each.tick_params(labelsize=8)
        each.grid(color="0.9", lw=0.8)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _batches(groups: Sequence[Group]) -> list[int]:
    return sorted({group.batch_size for group in groups})


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Draws one legend for all axes, below them."""
    entries: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        handles = list(entries.values())
        figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=8)


def _sign(group: Group) -> float:
    return -1.0 if group.about.higher_is_better else 1.0


def _scale(axes: Axes, groups: Sequence[Group]) -> None:
    """Uses a log scale for a metric that is positive and where smaller is better."""
    about = groups[0].about
    if not about.higher_is_better and axes.dataLim.y0 > 0:
        axes.set_yscale("log")
        _plain_ticks(axes)


def _plain_ticks(axes: Axes) -> None:
    """Labels a log scale with plain numbers."""
    axes.yaxis.set_major_formatter(_Plain())
    axes.yaxis.set_minor_formatter(_Plain(minor_thresholds=(1, 0.5)))
    axes.tick_params(which="both", labelsize=8)


class _Plain(LogFormatter):
    """Chooses the labels of a log scale, and writes 0.1 instead of 1e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _metric(groups: Sequence[Group]) -> str:
    about = groups[0].about
    unit = f" ({about.loss_unit})" if about.metric == "loss" and about.loss_unit else ""
    return f"held-out {about.metric}{unit}"


def curves(groups: Sequence[Group], folder: Path, path: Path) -> Figure | None:
    """Draws the metric against steps, examples and seconds, at the best rate of each optimizer."""
    batches, colours = _batches(groups), _colours(groups)
    by_group = [
        (group, [each for _, each in group.curves(folder, group.best_rate)])
        for group in groups
        if group.best_rate is not None
    ]
    if not any(found for _, found in by_group):
        return None
    timed = any(np.isfinite(each.seconds).all() for _, found in by_group for each in found)
    columns = ("steps", "examples", "seconds") if timed else ("steps", "examples")
    figure, axes = _panels(len(batches), len(columns), "Course at the best learning rate")
    for group, found in by_group:
        if not found:
            continue
        row = batches.index(group.batch_size)
        style = "-" if group.is_interior else "--"
        label = group.label if group.is_interior else f"{group.label} ({group.note})"
        for column, x in enumerate(columns):
            at = axes[len(columns) * row + column]
            middle = _middle(found, x)
            if middle is None:
                continue
            horizontal, mean, low, high = middle
            s = _sign(group)
            colour, alone = colours[group.label], len(horizontal) == 1  # one point has no line
            (line,) = at.plot(horizontal, s * mean, color=colour, lw=1.6, label=label, ls=style)
            line.set_marker("o" if alone else "")
            at.fill_between(horizontal, s * low, s * high, color=colour, alpha=0.15)
            if alone:
                at.vlines(horizontal, s * low, s * high, color=colour, lw=1)
    for index, at in enumerate(axes):
        at.xaxis.set_major_locator(MaxNLocator(4))
        at.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        row, column = divmod(index, len(columns))
        at.set_xlabel(("step", "examples", "seconds of training")[column], fontsize=9)
        if column == 0:
            batch = batches[row]
            at.set_ylabel(f"{_metric(groups)}\nbatch {batch:,}", fontsize=9)
        _scale(at, groups)
    _legend(figure, axes)
    return write(figure, path)


def _middle(found: Sequence[Curve], x: str) -> tuple[Floats, Floats, Floats, Floats] | None:
    """Returns the horizontal values, and mean, lowest and highest metric over the seeds."""
    length = min(len(each.steps) for each in found)
    values = np.array([each.values[:length] for each in found])
    horizontal = np.array([getattr(each, x)[:length] for each in found])
    if not np.isfinite(horizontal).all():
        return None
    return horizontal.mean(0), values.mean(0), values.min(0), values.max(0)


def best(groups: Sequence[Group], path: Path) -> Figure | None:
    """Draws the best metric per optimizer and batch size, with every tried rate behind it."""
    batches, colours = _batches(groups), _colours(groups)
    labels = list(colours)
    figure, (axes,) = _panels(1, 1, "Best by optimizer and batch size", width=7.5)
    means: dict[str, list[tuple[float, float]]] = {label: [] for label in labels}
    tops = []
    for group in groups:
        dodge = (labels.index(group.label) - (len(labels) - 1) / 2) * 0.6 / len(labels)
        x, colour = batches.index(group.batch_size) + dodge, colours[group.label]
        tried = np.concatenate([np.empty(0), *(group.values(rate) for rate in group.scores)])
        tops += list(tried)
        axes.plot(np.full(tried.shape, x), tried, "o", color=colour, alpha=0.3, ms=4, mew=0)
        if group.best_rate is None:
            continue
        values = group.values(group.best_rate)
        if group.is_interior:
            spread = [[values.mean() - values.min()], [values.max() - values.mean()]]
            axes.errorbar(x, values.mean(), spread, fmt="D", color=colour, ms=7, capsize=4,
                          label=group.label)  # fmt: skip
            means[group.label].append((x, float(values.mean())))
        else:
            axes.plot(x, values.mean(), "D", mfc="none", mec=colour, ms=8,
                      label=f"{group.label}: {group.note}, no best")  # fmt: skip
    if not tops:
        return None
    for label, points in means.items():
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), color=colours[label], lw=1)
    axes.set_xticks(range(len(batches)), [f"{batch:,}" for batch in batches])
    axes.set_xlim(-0.6, len(batches) - 0.4)
    axes.set_xlabel("batch size")
    axes.set_ylabel(_metric(groups))
    _scale(axes, groups)
    _legend(figure, [axes])
    return write(figure, path)


def sensitivity(groups: Sequence[Group], path: Path) -> Figure | None:
    """Draws the metric against the learning rate, with the usable range as a bar below."""
    batches, colours = _batches(groups), _colours(groups)
    columns = min(len(batches), 3)
    figure, axes = _panels(
        math.ceil(len(batches) / columns), columns, "Sensitivity to the learning rate", 5.0
    )
    drawn = False
    for group in groups:
        at, colour = axes[batches.index(group.batch_size)], colours[group.label]
        finite = [(r, _sign(group) * s) for r, s in group.scores.items() if math.isfinite(s)]
        for rate in group.scores:
            values = group.values(rate)
            if math.isfinite(group.scores[rate]):
                at.plot(np.full(values.shape, rate), values, ".", color=colour, alpha=0.4)
            else:
                at.plot(rate, 0.97, "x", color=colour, transform=at.get_xaxis_transform())
        if not finite:
            continue
        drawn = True
        at.plot(*zip(*finite, strict=True), "-", color=colour, lw=1.4, label=group.label)
        if group.is_interior and group.best_rate is not None:
            mark = _sign(group) * group.scores[group.best_rate]
            at.plot(group.best_rate, mark, "D", color=colour, ms=6)
        if group.usable is not None:
            height = 0.02 + 0.02 * list(colours).index(group.label)
            at.plot(group.usable, [height, height], "|-", color=colour, lw=2.5, ms=7,
                    transform=at.get_xaxis_transform())  # fmt: skip
    if not drawn:
        return None
    for index, at in enumerate(axes):
        at.set_visible(index < len(batches))
        if index < len(batches):
            at.set_xscale("log")
            at.set_xlabel("learning rate", fontsize=9)
            at.set_ylabel(_metric(groups), fontsize=9)
            at.set_title(f"batch {batches[index]:,}", fontsize=9, loc="right")
            _scale(at, groups)
            at.margins(y=0.15)
    _legend(figure, axes)
    return write(figure, path)


def steps_to_target(
    groups: Sequence[Group],
    steps: Steps,
    at_edge: Steps,
    fitted: Mapping[str, Fit],
    target: str,
    path: Path,
) -> Figure | None:
    """Draws the steps to the target against the batch size, with the fitted curves.

    Args:
      groups: the groups of the sweep.
      steps: the steps at tuned learning rates.
      at_edge: those where the rate with the fewest steps is at the edge of the tried ones.
      fitted: label -> the fit.
      target: the target in words.
      path: the PNG file.
    """
    colours = _colours(groups)
    reached = {batch for by_batch in (*steps.values(), *at_edge.values()) for batch in by_batch}
    if len(reached) < 2:  # the table has the steps of a single batch size
        return None
    figure, (axes,) = _panels(1, 1, f"Steps to {target}", width=7.0)
    for label, by_batch in at_edge.items():
        means = np.array([np.mean(values) for values in by_batch.values()])
        if by_batch:
            axes.plot(list(by_batch), means, "D", mfc="none", mec=colours[label], ms=7,
                      label=f"{label}: at the edge of the tried rates")  # fmt: skip
    for label, by_batch in steps.items():
        if not by_batch:
            continue
        batches = np.array(sorted(by_batch), np.float64)
        means = np.array([np.mean(by_batch[int(batch)]) for batch in batches])
        for batch in by_batch:
            values = np.array(by_batch[batch])
            axes.plot(np.full(values.shape, batch), values, ".", color=colours[label], alpha=0.4)
        style = "D" if label in fitted else "D--"
        axes.plot(batches, means, style, color=colours[label], ms=6, lw=1, label=label)
        if label in fitted:
            curve = fitted[label]
            dense = np.geomspace(batches[0] / 1.3, batches[-1] * 1.3, 100)
            axes.plot(dense, curve.steps(dense), color=colours[label], lw=1.4)
            if batches[0] <= curve.critical_batch <= batches[-1]:
                axes.axvline(curve.critical_batch, color=colours[label], ls=":", lw=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _plain_ticks(axes)
    ticks = _batches(groups)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("batch size")
    axes.set_ylabel("steps", color=GREY)
    _legend(figure, [axes])
    return write(figure, path)
