"""The plot of ``optim-zoo lr-find``."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterMathtext, LogLocator

from optim_zoo.lab.lr_find import Found
from optim_zoo.train.sinks.plots.figure import BLUE, PALE_BLUE, VERMILION, line_figure, write


def draw(found: Found, unit: str, path: Path) -> Figure:
    """Draws the loss against the learning rate, with the suggested range."""
    label = f"loss ({unit})" if unit else "loss"
    figure, axes = line_figure("Loss while the learning rate rises", label, 7.0, 4.0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_major_formatter(LogFormatterMathtext())
    axes.set_xlabel("learning rate")
    axes.plot(found.rates, found.losses, color=PALE_BLUE, lw=1, label="loss")
    axes.plot(found.rates, found.smoothed, color=BLUE, lw=1.8, label="smoothed")
    if found.low is not None and found.high is not None and found.suggestion is not None:
        text = f"range {found.low:.2g} to {found.high:.2g}"
        axes.axvspan(found.low, found.high, color=VERMILION, alpha=0.12, lw=0, label=text)
        text = f"suggestion {found.suggestion:.2g}"
        axes.axvline(found.suggestion, color=VERMILION, lw=1.4, label=text)
    finite = np.array(found.smoothed)[np.isfinite(found.smoothed)]
    if finite.size:
        margin = 0.15 * (finite[0] - finite.min() + 1e-6)
        axes.set_ylim(finite.min() - margin, finite[0] + 3 * margin)
    axes.legend(frameon=False, fontsize=9)
    return write(figure, path)
