"""The plot: loss against learning rate on both tasks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from optim_zoo.lab.experiments.drawing import COLOURS, write_small
from optim_zoo.lab.experiments.lars_lamb.measuring import KINDS, Result
from optim_zoo.train.sinks.plots.figure import DPI, log_ticks

_MARGIN = {"byte_language": 1.0, "digits": 2.0}  # nats above the lowest best loss that are shown


def draw(results: Sequence[Result], path: Path) -> Figure:
    """Draws the mean loss of each rate with the range of the seeds; a diamond is the best one."""
    figure = Figure(figsize=(9.6, 4.3), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(KINDS))
    for axes, kind in zip(panels, KINDS, strict=True):
        own = [result for result in results if result.kind is kind]
        means = [result.tuned.best_losses.mean() for result in own]
        low = min(means)
        high = low + _MARGIN[kind.name]
        for result in own:
            tuned, colour = result.tuned, COLOURS[result.optimizer.name]
            rates = [rate for rate in tuned.rows if np.isfinite(tuned.losses(rate)).all()]
            values = np.array([tuned.losses(rate) for rate in rates])
            if not rates:
                continue
            axes.fill_between(rates, values.min(1), values.max(1), color=colour, alpha=0.18, lw=0)
            axes.plot(rates, values.mean(1), ".-", color=colour, lw=1.8, ms=5,
                      label=result.optimizer.title)  # fmt: skip
            if tuned.interior and tuned.best is not None:
                axes.plot(tuned.best, tuned.best_losses.mean(), "D", color=colour, ms=7, zorder=5)
        if kind.name == "digits":
            axes.set_yscale("log")
            ticks = log_ticks(0.8 * low, high)
            axes.set_yticks(list(ticks), [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_ylim(0.8 * low, high)
        else:
            axes.set_ylim(low - 0.06 * (high - low), high)
        axes.set_xscale("log")
        axes.set_title(kind.title, loc="left", fontsize=12)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("held-out loss (nats)")
        axes.tick_params(labelsize=9)
        axes.grid(color="0.92", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return write_small(figure, path)
