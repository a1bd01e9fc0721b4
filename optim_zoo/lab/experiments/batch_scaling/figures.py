"""The plots: loss against batch size, and steps to a target against batch size."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optim_zoo.lab import fits
from optim_zoo.lab.experiments.batch_scaling.measuring import Result, Scale
from optim_zoo.lab.experiments.drawing import COLOURS, label_ends, write_small
from optim_zoo.train.sinks.plots.figure import GREY, log_ticks, new_figure

_MARGIN = 0.45  # nats above the highest tuned loss that are shown


def draw_losses(results: Sequence[Result], scale: Scale, path: Path) -> Figure:
    """Draws the best loss at each batch size, all tried rates behind it, and the untuned one."""
    figure, axes = new_figure(8.6, 5.0)
    _prepare(axes, scale)
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


def draw_steps(fitted: Sequence[tuple[Result, fits.Fit | str]], scale: Scale, path: Path) -> Figure:
    """Draws the steps to the target of each optimizer, with the fitted curves."""
    figure, axes = new_figure(8.6, 4.6)
    _prepare(axes, scale)
    axes.set_title("Steps to a target loss, and the fit S(B) = S_min (1 + B_crit / B)",
                   loc="left", fontsize=12)  # fmt: skip
    axes.set_ylabel("steps")
    axes.set_yscale("log")
    ends = []
    dense = np.geomspace(scale.batches[0], scale.batches[-1], 100)
    for result, fit in fitted:
        colour = COLOURS[result.optimizer.name]
        steps = result.steps_to_target(scale)
        for batch, values in steps.items():
            axes.plot(np.full(len(values), batch), values, ".", color=colour, alpha=0.4, ms=6)
            axes.plot(batch, np.mean(values), "D", color=colour, ms=6)
        if not any(steps.values()):
            continue
        end = float(np.mean(steps[max(steps)]))
        text = f"{result.optimizer.title}, to {result.target():.2f}"
        if isinstance(fit, fits.Fit):
            axes.plot(dense, fit.steps(dense), color=colour, lw=1.6)
            text += f"\nB_crit {fit.critical_batch:,.0f}"
            end = float(fit.steps(dense[-1:])[0])
        ends.append((end, text, colour))
    low, high = axes.get_ylim()
    ticks = log_ticks(low, high)
    axes.set_yticks(list(ticks), [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)
    label_ends(axes, ends, 0.11)
    return write_small(figure, path)


def _prepare(axes: Axes, scale: Scale) -> None:
    axes.grid(color="0.92", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xscale("log", base=2)
    axes.set_xticks(scale.batches, [f"{batch:,}" for batch in scale.batches])
    axes.set_xlim(scale.batches[0] / 1.4, scale.batches[-1] * 1.4)
    axes.set_xlabel("batch size")
