"""The plots: loss against batch size, and steps to a target against batch size."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from optim_zoo.lab import fits
from optim_zoo.lab.experiments.batch_scaling.measuring import Result, Scale, Target
from optim_zoo.lab.experiments.drawing import COLOURS, label_ends, write_small
from optim_zoo.train.sinks.plots.figure import DPI, GREY, log_ticks, new_figure

_MARGIN = 0.45  # nats above the highest tuned loss that are shown


def draw_losses(results: Sequence[Result], scale: Scale, path: Path) -> Figure:
    """Draws the best loss at each batch size, all tried rates behind it, and the untuned one."""
    figure, axes = new_figure(8.6, 5.0)
    _prepare(axes, scale.batches)
    axes.set_title(
        f"Byte language model: held-out loss after {scale.examples:,} examples",
        loc="left", fontsize=12,
    )  # fmt: skip
    axes.set_ylabel("held-out loss (nats per byte)")
    means = [t.best_losses.mean() for each in results for t in each.tuned.values()]
    shown = [mean for mean in means if np.isfinite(mean)]
    low, high = min(shown) - 0.06, max(shown) + _MARGIN
    axes.set_ylim(low, high)
    ends = []
    for index, result in enumerate(results):
        colour = COLOURS[result.optimizer.name]
        dodge = 2 ** (0.11 * (index - (len(results) - 1) / 2))
        for batch, tuned in result.tuned.items():
            tried = np.array([tuned.losses(rate)[0] for rate in tuned.rows])
            inside = tried[tried <= high]
            x = np.full(inside.shape, batch * dodge)
            axes.plot(x, inside, "o", color=colour, alpha=0.28, ms=4.5, mew=0, zorder=2)
            if inside.size < tried.size:
                axes.plot(batch * dodge, high, "^", color=colour, alpha=0.35, ms=6, mew=0,
                          clip_on=False)  # fmt: skip
        end = _best_line(axes, result, dodge, colour)
        _untuned_line(axes, result, dodge, colour)
        if end is not None:
            ends.append((end, result.optimizer.title, colour))
    label_ends(axes, ends, 0.055)
    axes.plot([], [], "D-", color=GREY, ms=6, lw=2, label="tuned at every batch size, 3 seeds")
    axes.plot([], [], "--", color=GREY, lw=1.4,
              label="tuned at the smallest, then scaled by the square root")  # fmt: skip
    axes.plot([], [], "o", color=GREY, alpha=0.35, ms=4.5, mew=0,
              label="every other rate tried (triangle: above the axis)")  # fmt: skip
    axes.legend(fontsize=8.5, frameon=False, loc="upper left")
    return write_small(figure, path)


def _best_line(axes: Axes, result: Result, dodge: float, colour: str) -> float | None:
    """Draws the tuned losses, and returns the last one."""
    points = [
        (batch * dodge, tuned.best_losses)
        for batch, tuned in result.tuned.items()
        if tuned.interior and np.isfinite(tuned.best_losses).all()
    ]
    if not points:
        return None
    x = [place for place, _ in points]
    middle = np.array([values.mean() for _, values in points])
    below = middle - [values.min() for _, values in points]
    above = [values.max() for _, values in points] - middle
    axes.errorbar(
        x, middle, [below, above], fmt="D-", color=colour, ms=6, lw=2, capsize=3, zorder=4
    )
    return float(middle[-1])


def _untuned_line(axes: Axes, result: Result, dodge: float, colour: str) -> None:
    batches = [b for b in result.untuned if np.isfinite(result.untuned_losses(b)).all()]
    means = [result.untuned_losses(batch).mean() for batch in batches]
    x = np.array(batches, np.float64) * dodge
    axes.plot(x, means, "--", color=colour, lw=1.4, zorder=3)


def draw_steps(panels: Sequence[Sequence[Target]], scale: Scale, path: Path) -> Figure:
    """Draws the steps to the targets of each optimizer, with the fitted curves.

    Args:
      panels: the targets of every optimizer, for each panel.
      scale: the size of the experiment.
      path: the PNG file.
    """
    figure = Figure(figsize=(11.0, 4.6), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(
        "Steps to a target loss, and the fit S(B) = S_min (1 + B_crit / B)",
        x=0.01, ha="left", fontsize=12,
    )  # fmt: skip
    for axes, targets in zip(figure.subplots(1, len(panels)), panels, strict=True):
        batches = sorted({batch for target in targets for batch in target.steps})
        _prepare(axes, batches or scale.batches)
        axes.tick_params(labelsize=9)
        axes.set_title(f"targets reached at {len(batches)} batch sizes", loc="left", fontsize=10)
        axes.set_ylabel("steps")
        axes.set_yscale("log")
        ends = [end for target in targets if (end := _steps_line(axes, target)) is not None]
        low, high = axes.get_ylim()
        ticks = log_ticks(low, high)
        axes.set_yticks(list(ticks), [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(low, high)
        label_ends(axes, ends, 0.12)
    return write_small(figure, path)


def _steps_line(axes: Axes, target: Target) -> tuple[float, str, str] | None:
    """Draws the steps of one optimizer, and returns the height, text and colour of its label."""
    colour = COLOURS[target.optimizer.name]
    for batch, values in target.steps.items():
        axes.plot(np.full(len(values), batch), values, ".", color=colour, alpha=0.4, ms=6)
        axes.plot(batch, np.mean(values), "D", color=colour, ms=6)
    if not any(target.steps.values()):
        return None
    batches = sorted(target.steps)
    end = float(np.mean(target.steps[batches[-1]]))
    text = f"{target.optimizer.title}, to {target.loss:.2f}"
    if isinstance(target.fit, fits.Fit):
        dense = np.geomspace(batches[0], batches[-1], 100)
        axes.plot(dense, target.fit.steps(dense), color=colour, lw=1.6)
        text += f"\nB_crit {target.fit.critical_batch:,.0f}"
    return end, text, colour


def _prepare(axes: Axes, batches: Sequence[int]) -> None:
    axes.grid(color="0.92", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.set_xlim(batches[0] / 1.4, batches[-1] * 1.4)
    axes.set_xlabel("batch size")
