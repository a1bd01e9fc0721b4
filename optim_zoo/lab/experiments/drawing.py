"""Parts of figures that several experiments share."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from optim_zoo.train.files import replace_file
from optim_zoo.train.sinks.plots.figure import write

# From the palette by Okabe and Ito, which colour-blind readers can tell apart.
COLOURS: Mapping[str, str] = MappingProxyType(
    {"momentum": "#009E73", "adamw": "#D55E00", "lamb": "#0072B2", "lars": "#AA4499"}
)


def write_small(figure: Figure, path: Path) -> Figure:
    """Writes a PNG of 256 colours, which has less than half the size."""
    write(figure, path)
    content = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(
            content, format="png", optimize=True
        )
    replace_file(path, content.getvalue())
    return figure


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Returns heights for labels near the given ones, in the same order, at least ``gap`` apart.

    Labels that would overlap are moved by equal amounts around their mean.
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    groups: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        groups.append([index])
        centres.append(heights[index])
        while len(groups) > 1 and (
            centres[-1] - centres[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            groups[-2:] = [[*groups[-2], *groups[-1]]]
            centres[-2:] = [sum(heights[i] for i in groups[-1]) / len(groups[-1])]
    placed = list(heights)
    for group, centre in zip(groups, centres, strict=True):
        for place, index in enumerate(group):
            placed[index] = centre + gap * (place - (len(group) - 1) / 2)
    return placed


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], gap: float) -> None:
    """Writes labels to the right of the axes, (height, text, colour) of each, without overlaps.

    Args:
      axes: their limits are final, and their scale may be logarithmic.
      ends: height in the units of the data, text and colour.
      gap: the least distance of two labels, as a fraction of the height of the axes.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((axes.get_xlim()[1], y))[1]) for y, _, _ in ends]
    heights = [min(max(height, 0.0), 1.0) for height in heights]
    for height, (_, text, colour) in zip(apart(heights, gap), ends, strict=True):
        axes.annotate(
            text, (1.01, height), xycoords="axes fraction", va="center", ha="left",
            fontsize=9, color=colour, annotation_clip=False,
        )  # fmt: skip
