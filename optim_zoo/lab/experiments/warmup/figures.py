"""The plots: the ratio of update norms against the exact multiplier, and the held-out losses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from optim_zoo.lab.experiments.warmup.training import Measured, multiplier
from optim_zoo.train.sinks.plots.figure import BLUE, DPI, GREY, VERMILION, line_figure, write

_COLOURS = (VERMILION, "#E69F00", BLUE)


def draw_ratios(measured: Sequence[Measured], path: Path) -> Figure:
    """Draws how many times larger the update without correction is, in the corrected runs."""
    figure, axes = line_figure(
        "Update without bias correction, divided by that with it", "ratio of norms", 7.5, 3.8
    )
    scale = measured[0].scale
    steps = np.arange(1, scale.steps + 1)
    exact = multiplier(steps)
    axes.plot(steps, exact, color="0.8", lw=7, label="(1 - b1^t) / sqrt(1 - b2^t)")
    for one, colour in zip([m for m in measured if m.corrected], (VERMILION, BLUE), strict=True):
        found = one.ratio[0, one.best(0)]  # (seeds, steps), without warmup
        label = f"{one.form.title}, learning rate {one.form.rates[one.best(0)]:g}"
        axes.plot(steps, found.mean(0), color=colour, lw=1.6, label=label)
        axes.fill_between(steps, found.min(0), found.max(0), color=colour, alpha=0.2, lw=0)
    peak = int(exact.argmax())
    axes.annotate(
        f"{exact[peak]:.2f} at t = {steps[peak]}", (steps[peak], exact[peak]), xytext=(8, 4),
        textcoords="offset points", fontsize=8, color=GREY,
    )  # fmt: skip
    axes.set_ylim(0, 1.12 * exact.max())
    axes.legend(fontsize=8, frameon=False)
    return write(figure, path)


def draw_losses(measured: Sequence[Measured], path: Path) -> Figure:
    """Draws the held-out loss against the learning rate, for every warmup."""
    names = list(dict.fromkeys(one.form.name for one in measured))
    figure = Figure(
        figsize=(4.2 * len(names), 4.2), dpi=DPI, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    every = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for one in measured:
        axes = every[names.index(one.form.name)]
        rates = np.array(one.form.rates)
        for index, warmup in enumerate(one.scale.warmups):
            word = "corrected" if one.corrected else "not corrected"
            mean = np.where(np.isfinite(one.mean()[index]), one.mean()[index], np.nan)
            # Moved sideways, so that the seeds of the six lines do not cover each other.
            moved = rates * 1.05 ** (2 * index - 2 + (0.5 if one.corrected else -0.5))
            style = "-o" if one.corrected else "--s"
            axes.plot(moved, mean, style, color=_COLOURS[index], lw=1.4, ms=5,
                      mfc=_COLOURS[index] if one.corrected else "white",
                      label=f"{word}, warmup {100 * warmup:g} %")  # fmt: skip
            low, high = one.loss[index].min(-1), one.loss[index].max(-1)
            axes.vlines(moved, low, high, color=_COLOURS[index], lw=1)
        axes.set_title(one.form.title, fontsize=11, loc="left")
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_xlabel("learning rate", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="0.9", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    every[0].set_ylabel("held-out loss (nats per byte)", fontsize=9)
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    return write(figure, path)
