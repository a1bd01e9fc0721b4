"""The plots: F1 against steps, and the distance from the start and the norm against steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from optim_zoo.lab.experiments.fine_tuning_zero.arms import BASE, Arm
from optim_zoo.lab.experiments.fine_tuning_zero.results import Results
from optim_zoo.train.sinks.plots.figure import BLUE, DPI, GREY, VERMILION, step_axis, write

_GREEN, _SKY = "#009E73", "#56B4E9"  # of the palette by Okabe and Ito
# Repaired or without a defect: solid. Slow weights that start at zero: dashed.
_STYLES = {
    BASE: ("black", "-"),
    "scratch": (GREY, ":"),
    "radam": (_GREEN, "-"),
    "lookahead": (BLUE, "-"),
    "ranger": (VERMILION, "-"),
    "lookahead_zero": (BLUE, "--"),
    "ranger_zero": (VERMILION, "--"),
    "lookahead_0.8_zero": (_SKY, "--"),
}


def draw_f1(results: Results, baseline: float, path: Path) -> Figure:
    """Draws the F1 of every arm: the mean over the seeds, and a band over all of them."""
    figure, panels = _panels("Held-out F1 when fine-tuning", 2)
    titles = ("learning rate of BERT's AdamW", "learning rate raised")
    for axes, title, raised in zip(panels, titles, (False, True), strict=True):
        for arm in results.arms():
            # The two arms to compare with are in both panels.
            if arm.name in (BASE, "scratch") or bool(arm.raised_from) == raised:
                curves = results.values(arm.name, "evaluated")  # (seeds, evaluations, 2)
                _draw(axes, arm, curves[0, :, 0], curves[:, :, 1])
        axes.axhline(baseline, color=GREY, lw=1, label="most frequent tag")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylim(0, 1)
    panels[0].set_ylabel("held-out F1")
    _legend(figure, panels)
    return write(figure, path)


def draw_movement(results: Results, path: Path) -> Figure:
    """Draws the distance from the start and the norm, relative to the norm at the start."""
    figure, panels = _panels("The pretrained parameters, relative to their norm at the start", 2)
    for arm in results.arms():
        if arm.raised_from or not arm.pretrained:
            continue
        norm = results.values(arm.name, "norm")
        distance = results.values(arm.name, "distance")
        steps = np.arange(norm.shape[1])
        _draw(panels[0], arm, steps[2:], distance[:, 2:] / norm[:, :1])
        _draw(panels[1], arm, steps, norm / norm[:, :1])
    panels[0].set_yscale("log")
    panels[0].set_ylim(1e-4, 1)
    panels[0].set_title("distance from the start", loc="left", fontsize=10)
    panels[1].set_title("norm", loc="left", fontsize=10)
    panels[1].set_ylim(0, 1.1)
    _legend(figure, panels)
    return write(figure, path)


def _panels(title: str, count: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(9.6, 4.2), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    panels: Any = figure.subplots(1, count)
    for axes in panels:
        axes.grid(color="0.9", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        step_axis(axes)
    return figure, panels


def _draw(axes: Axes, arm: Arm, steps: np.ndarray, values: np.ndarray) -> None:
    """Draws one arm; ``values`` is (seeds, steps)."""
    colour, line = _STYLES[arm.name.removesuffix("_raised")]
    axes.plot(steps, values.mean(0), line, color=colour, lw=1.8, label=arm.title)
    axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Adds one legend for all panels, below them."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        handles=list(found.values()),
        labels=list(found),
        loc="outside lower center",
        ncols=3,
        fontsize=9,
        frameon=False,
    )
