"""Line plots over steps: loss, held-out metrics, learning rate, gradient norm and skipped steps.

Every function writes a PNG and returns the figure. It returns None, and writes nothing, where the
records hold nothing to draw.
"""

import pathlib

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from optim_zoo.train.records import Floats, Records
from optim_zoo.train.sinks.base import shown_name
from optim_zoo.train.sinks.plots.figure import (
    BLUE,
    GREY,
    PALE_BLUE,
    VERMILION,
    finite,
    line_figure,
    log_ticks,
    widened,
    write,
)
from optim_zoo.train.tasks.base import Baseline


def loss(
    records: Records, path: pathlib.Path, *, baseline: Baseline | None, unit: str
) -> Figure | None:
    """Draws the training and held-out loss, and the loss of a trivial predictor as a dashed line.

    Args:
      records: the metrics of the run.
      path: the PNG file.
      baseline: the trivial predictor, if there is one.
      unit: the unit of the loss, for the axis.
    """
    train, evaluated = finite(records.train, "loss"), finite(records.held_out, "loss")
    if not train[0].size + evaluated[0].size:
        return None
    label = f"loss ({unit})" if unit else "loss"
    figure, axes = line_figure("Loss", label, width=9.0, height=4.2)
    _raw_and_smoothed(axes, *train, "training")
    if evaluated[0].size:
        axes.plot(*evaluated, "o-", color=VERMILION, lw=1, ms=4, label="held-out", zorder=3)
    marks = _skips(records)
    if marks.size:
        bottom = axes.get_xaxis_transform()  # x in steps, y as a fraction of the height
        axes.plot(marks, np.full(marks.shape, 0.02), "|", color=VERMILION, ms=9, transform=bottom,
                  label="skipped")  # fmt: skip
    _draw_baseline(axes, baseline, "loss")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, frameon=False, fontsize=9)
    return write(figure, path)


def held_out(
    records: Records, name: str, path: pathlib.Path, *, baseline: Baseline | None
) -> Figure | None:
    """Draws the held-out metric ``name``, and the value of a trivial predictor."""
    steps, values = finite(records.held_out, name)
    if not steps.size:
        return None
    text = shown_name(name).replace("_", " ")
    figure, axes = line_figure(f"Held-out {text}", text, width=5.6, height=3.2)
    axes.plot(steps, values, "o-", color=VERMILION, lw=1.6, ms=4, label="held-out")
    _draw_baseline(axes, baseline, name)
    axes.legend(loc="best", frameon=False, fontsize=9)
    return write(figure, path)


def _draw_baseline(axes: Axes, baseline: Baseline | None, metric: str) -> None:
    if baseline is not None and metric in baseline.metrics:
        value = baseline.metrics[metric]
        label = f"by {baseline.name} ({value:.2f})"
        axes.axhline(value, color=GREY, ls="--", lw=1.2, label=label)


_SKIPPED = {"skipped_steps": "steps", "skipped_micro_batches": "micro-batches"}


def skipped(records: Records, path: pathlib.Path) -> Figure | None:
    """Draws the number of skipped steps and micro-batches, if there are any."""
    if not _skips(records).size:
        return None
    figure, axes = line_figure("Skipped since the start", "count", width=5.6, height=3.2)
    for (name, label), color in zip(_SKIPPED.items(), (VERMILION, BLUE), strict=True):
        steps, values = finite(records.train, name)
        if values.any():
            axes.step(steps, values, where="post", color=color, lw=1.6, label=label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    return write(figure, path)


def _skips(records: Records) -> Floats:
    """Returns the logged steps at which a count of skipped steps or micro-batches has risen."""
    rises = []
    for name in _SKIPPED:
        steps, values = finite(records.train, name)
        rises.append(steps[np.diff(values, prepend=0) > 0])
    return np.unique(np.concatenate(rises))


def learning_rate(records: Records, path: pathlib.Path) -> Figure | None:
    """Draws the learning rate by step."""
    steps, values = finite(records.train, "learning_rate")
    if not steps.size:
        return None
    figure, axes = line_figure("Learning rate", "learning rate", width=5.6, height=3.2)
    axes.plot(steps, values, color=BLUE, lw=1.6, marker="." if steps.size < 20 else None)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return write(figure, path)


def gradient_norm(records: Records, path: pathlib.Path) -> Figure | None:
    """Draws the norm of the gradient by step on a log scale, without steps where it is 0."""
    return _positive(records, "gradient_norm", path, "Gradient norm", "gradient norm")


def critical_batch_size(records: Records, path: pathlib.Path) -> Figure | None:
    """Draws the estimated critical batch size by step on a log scale, where it is measured."""
    title = "Estimated critical batch size"
    return _positive(records, "critical_batch_size", path, title, "examples")


def _positive(
    records: Records, name: str, path: pathlib.Path, title: str, label: str
) -> Figure | None:
    """Draws the values of a quantity that are above 0 on a log scale."""
    steps, values = finite(records.train, name)
    steps, values = steps[values > 0], values[values > 0]
    if not steps.size:
        return None
    figure, axes = line_figure(title, label, width=5.6, height=3.2)
    _raw_and_smoothed(axes, steps, values, label)
    low, high = widened(values.min(), values.max())
    ticks = log_ticks(low, high)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks(list(ticks), [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    return write(figure, path)


def _raw_and_smoothed(axes: Axes, steps: Floats, values: Floats, label: str) -> None:
    """Draws the values in a pale colour and their running mean in a strong one."""
    reach = values.size // 50
    if reach == 0:
        axes.plot(steps, values, ".-", color=BLUE, lw=1.6, label=label)
        return
    axes.plot(steps, values, color=PALE_BLUE, lw=0.8, label=label)
    axes.plot(steps, _smoothed(values, reach), color=BLUE, lw=1.8, label=f"{label}, smoothed")


def _smoothed(values: Floats, reach: int) -> Floats:
    """Returns the mean over ``reach`` neighbours on either side, which does not lag behind.

    Near the start the window is symmetric and shorter, because the loss falls steeply there. Near
    the end it is cut off.
    """
    index = np.arange(values.size)
    half = np.minimum(index, reach)
    first, end = index - half, np.minimum(index + half + 1, values.size)
    total = np.concatenate([[0.0], np.cumsum(values)])
    mean: Floats = (total[end] - total[first]) / (end - first)
    return mean
