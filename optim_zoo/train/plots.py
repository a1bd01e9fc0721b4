"""The pictures of a run: loss, learning rate, gradient norm, and trust ratio and norms by layer.

Every function draws from the records, writes a PNG and returns the figure, or None, having written
nothing, where the records hold nothing to draw.
"""

import io
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from optim_zoo.train import records as run_records
from optim_zoo.train.records import Floats, Records

DPI = 130

# Blue and vermilion of the palette by Okabe and Ito, told apart by every kind of colour vision.
_BLUE, _PALE_BLUE, _VERMILION, _GREY = "#0072B2", "#A6CEE3", "#D55E00", "#555555"

CAPTIONS: Mapping[str, str] = {
    "loss.png": "Loss on the training batches and on held-out data. A dashed line is what knowing"
    " the token frequencies alone gives: below it, the model uses the context. Marks at the bottom"
    " are steps before which something was skipped.",
    "skipped.png": "Steps that were refused, and micro-batches that were left out, since the start"
    " of the run.",
    "learning_rate.png": "Learning rate of each step.",
    "gradient_norm.png": "Norm of the whole gradient, on a log scale.",
    "trust_ratio.png": "Trust ratio of every adapted layer: the factor by which the optimizer"
    " scaled its update. Rows are layers, the layers of one stack standing together.",
    "parameter_norm.png": "Norm of the parameters of every layer, before the step.",
    "update_norm.png": "Norm of the update of every layer. Where there are trust ratios: of the"
    " adapted layers' directions, before trust ratio and learning rate; else of the whole step.",
}


def write_all(
    records: Records, unigram_loss: float | None, folder: pathlib.Path
) -> list[pathlib.Path]:
    """Write every picture that has data into `folder`, and return their paths.

    `unigram_loss` is that of `loss`. Raises UserError where a file cannot be written.
    """
    draw: dict[str, Callable[[Records, pathlib.Path], Figure | None]] = {
        "loss.png": lambda records, path: loss(records, unigram_loss, path),
        "skipped.png": skipped,
        "learning_rate.png": learning_rate,
        "gradient_norm.png": gradient_norm,
        "trust_ratio.png": trust_ratio,
        "parameter_norm.png": parameter_norm,
        "update_norm.png": update_norm,
    }
    return [folder / name for name, f in draw.items() if f(records, folder / name) is not None]


def loss(records: Records, unigram_loss: float | None, path: pathlib.Path) -> Figure | None:
    """Draw the training and held-out loss by step, in nats.

    `unigram_loss` is the loss of always predicting the token frequencies, drawn as a dashed line;
    None where the task has no such thing.
    """
    train, held_out = _finite(records.train, "loss"), _finite(records.held_out, "loss")
    if not train[0].size + held_out[0].size:
        return None
    figure, axes = _line_figure("Loss", "loss (nats)", width=9.0, height=4.2)
    _raw_and_smoothed(axes, *train, "training")
    if held_out[0].size:
        axes.plot(*held_out, "o-", color=_VERMILION, lw=1, ms=4, label="held-out", zorder=3)
    marks = _skips(records)
    if marks.size:
        bottom = axes.get_xaxis_transform()  # steps across, a share of the height up
        axes.plot(marks, np.full(marks.shape, 0.02), "|", color=_VERMILION, ms=9, transform=bottom,
                  label="skipped")  # fmt: skip
    if unigram_loss is not None:
        label = f"token frequencies alone ({unigram_loss:.2f})"
        axes.axhline(unigram_loss, color=_GREY, ls="--", lw=1.2, label=label)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, frameon=False, fontsize=9)
    return _write(figure, path)


_SKIPPED = {"skipped_steps": "steps", "skipped_micro_batches": "micro-batches"}


def skipped(records: Records, path: pathlib.Path) -> Figure | None:
    """Draw how many steps and micro-batches were skipped so far; nothing where none was."""
    if not _skips(records).size:
        return None
    figure, axes = _line_figure("Skipped so far", "count", width=5.6, height=3.2)
    for (name, label), color in zip(_SKIPPED.items(), (_VERMILION, _BLUE), strict=True):
        steps, values = _finite(records.train, name)
        if values.any():
            axes.step(steps, values, where="post", color=color, lw=1.6, label=label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    return _write(figure, path)


def _skips(records: Records) -> Floats:
    """The logged steps before which, since the logged step before, something was skipped."""
    rises = []
    for name in _SKIPPED:
        steps, values = _finite(records.train, name)
        rises.append(steps[np.diff(values, prepend=0) > 0])
    return np.unique(np.concatenate(rises))


def learning_rate(records: Records, path: pathlib.Path) -> Figure | None:
    """Draw the learning rate by step."""
    steps, values = _finite(records.train, "learning_rate")
    if not steps.size:
        return None
    figure, axes = _line_figure("Learning rate", "learning rate", width=5.6, height=3.2)
    axes.plot(steps, values, color=_BLUE, lw=1.6, marker="." if steps.size < 20 else None)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return _write(figure, path)


def gradient_norm(records: Records, path: pathlib.Path) -> Figure | None:
    """Draw the norm of the gradient by step on a log scale; steps where it is 0 are left out."""
    steps, values = _finite(records.train, "gradient_norm")
    steps, values = steps[values > 0], values[values > 0]
    if not steps.size:
        return None
    figure, axes = _line_figure("Gradient norm", "gradient norm", width=5.6, height=3.2)
    _raw_and_smoothed(axes, steps, values, "gradient norm")
    low, high = _widened(values.min(), values.max())
    ticks = _log_ticks(low, high)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks(list(ticks), [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    return _write(figure, path)


def trust_ratio(records: Records, path: pathlib.Path) -> Figure | None:
    """Draw the trust ratio of every layer and step as a heat map."""
    return _layer_map(records, "trust_ratio", "Trust ratio by layer", path)


def parameter_norm(records: Records, path: pathlib.Path) -> Figure | None:
    """Draw the parameter norm of every layer and step as a heat map."""
    return _layer_map(records, "parameter_norm", "Parameter norm by layer", path)


def update_norm(records: Records, path: pathlib.Path) -> Figure | None:
    """Draw the update norm of every layer and step as a heat map.

    Where there are trust ratios, of the layers that have one: the norm of the others is that of the
    whole step, learning rate included, and not to be compared with a direction's.
    """
    adapted, _ = records.layers("trust_ratio")
    return _layer_map(records, "update_norm", "Update norm by layer", path, adapted)


def _layer_map(
    records: Records, quantity: str, title: str, path: pathlib.Path, only: Sequence[str] = ()
) -> Figure | None:
    """Heat map: a row a layer, a column as wide as the steps it stands for, colour on a log scale.

    What a log scale cannot show, zero and NaN, is grey. `only`, where it names any, is the layers
    to draw.
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
    label_width = max(map(len, labels)) * font_size * 0.6 / 72  # 0.6 em a letter, in inches.
    size = (6.5 + label_width, 1.7 + row_height * len(labels))
    figure, axes = _figure(*size)
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
    _step_axis(axes)
    axes.tick_params(axis="x", top=tall, labeltop=tall)
    for row in _group_starts([names[i] for i in order]):
        axes.axhline(row - 0.5, color="white", lw=1)

    pad = 0.12 / figure.get_figheight()
    bar = figure.colorbar(mesh, ax=axes, location="top", aspect=60, pad=pad, extend=extend)
    ticks = _log_ticks(low, high)
    bar.set_ticks(list(ticks), labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    grey = "; grey: zero or not finite" if np.ma.is_masked(shown) else ""
    bar.set_label(f"{quantity.replace('_', ' ')} (log scale{grey})", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return _write(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of that many inches, apart from any global state of matplotlib."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.tick_params(labelsize=9)
    return figure, axes


def _line_figure(title: str, ylabel: str, width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = _figure(width, height)
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_ylabel(ylabel)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(color="0.9", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _step_axis(axes)
    return figure, axes


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _write(figure: Figure, path: pathlib.Path) -> Figure:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    run_records.replace_file(path, content.getvalue())
    return figure


def _finite(columns: Mapping[str, tuple[Floats, Floats]], name: str) -> tuple[Floats, Floats]:
    steps, values = columns.get(name, (np.empty(0), np.empty(0)))
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def _raw_and_smoothed(axes: Axes, steps: Floats, values: Floats, label: str) -> None:
    """Draw the values pale and their running mean strong; too few to smooth as one strong line."""
    reach = values.size // 50
    if reach == 0:
        axes.plot(steps, values, ".-", color=_BLUE, lw=1.6, label=label)
        return
    axes.plot(steps, values, color=_PALE_BLUE, lw=0.8, label=label)
    axes.plot(steps, _smoothed(values, reach), color=_BLUE, lw=1.8, label=f"{label}, smoothed")


def _smoothed(values: Floats, reach: int) -> Floats:
    """Mean over `reach` neighbours on either side, so that a falling loss has no lag.

    At the start it takes as few after as there are before, since there a loss falls steeply; at the
    end it takes those there are.
    """
    index = np.arange(values.size)
    half = np.minimum(index, reach)
    first, end = index - half, np.minimum(index + half + 1, values.size)
    total = np.concatenate([[0.0], np.cumsum(values)])
    mean: Floats = (total[end] - total[first]) / (end - first)
    return mean


def _edges(steps: Floats) -> Floats:
    """Borders of the columns, (steps + 1,): half way between neighbours, as far out at the ends."""
    if steps.size == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _colour_range(values: Floats) -> tuple[float, float, str]:
    """Ends of the colour scale, and at which of them some values lie beyond.

    What is 4 times farther out than 99 of 100 values does not stretch the scale: one wild ratio
    would make all the others look alike.
    """
    smallest, largest = values.min(), values.max()
    low = max(smallest, np.quantile(values, 0.01, method="lower") / 4)
    high = min(largest, np.quantile(values, 0.99, method="higher") * 4)
    names = {(True, True): "both", (True, False): "min", (False, True): "max"}
    extend = names.get((bool(smallest < low), bool(largest > high)), "neither")
    if low == high:
        low, high = _widened(low, high)
    return float(low), float(high), extend


def _widened(low: float, high: float) -> tuple[float, float]:
    """A little room beyond both, also where they are one value; both are positive."""
    return float(low) / 1.1, float(high) * 1.1


def _log_ticks(low: float, high: float) -> Floats:
    """At most ten round values within a positive range, for a log scale."""
    powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    if high > 1e3 * low:
        ticks = 10.0 ** powers[:: -(-powers.size // 10)]
    else:
        ticks = np.outer(10.0**powers, [1, 2, 5]).ravel()
    ticks = ticks[(low <= ticks) & (ticks <= high)]
    if ticks.size < 3:  # Less than a decade: round values at even distances.
        ticks = np.asarray(MaxNLocator(5).tick_values(low, high))
        ticks = ticks[(low <= ticks) & (ticks <= high)]
    return ticks


_NUMBER = re.compile(r"\d+")
_KERNEL = re.compile(r"/kernel(?=(\[\d+\])?$)")


def _grouped(names: Sequence[str]) -> list[int]:
    """Order of the rows: leaves as in the file, layers 0, 1, 2, ... of one leaf together."""
    patterns = [_NUMBER.sub("#", name) for name in names]
    numbers = [tuple(map(int, _NUMBER.findall(name))) for name in names]
    first = {pattern: patterns.index(pattern) for pattern in set(patterns)}
    return sorted(range(len(names)), key=lambda i: (first[patterns[i]], numbers[i]))


def _group_starts(names: Sequence[str]) -> list[int]:
    """Rows, but the first, whose name differs in more than a number from the row before."""
    patterns = [_NUMBER.sub("#", name) for name in names]
    return [i for i in range(1, len(names)) if patterns[i] != patterns[i - 1]]


def _shortened(names: Sequence[str]) -> list[str]:
    """The names without a final `/kernel`, where they stay distinct, and without a common start."""
    without = [_KERNEL.sub("", name) for name in names]
    segments = [name.split("/") for name in (without if len(set(without)) == len(names) else names)]
    depth = min(map(len, segments)) - 1 if len(names) > 1 else 0
    common = next((i for i in range(depth) if len({path[i] for path in segments}) > 1), depth)
    return ["/".join(path[common:]) for path in segments]
