"""The sink that draws the plots of a run as PNG files in its folder."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from optim_zoo.train import records
from optim_zoo.train.records import Records
from optim_zoo.train.sinks.base import RunInfo, shown_name
from optim_zoo.train.sinks.plots import classes, heat_maps, lines
from optim_zoo.train.sinks.plots.figure import DPI as DPI
from optim_zoo.train.tasks.base import Baseline

CAPTIONS: Mapping[str, str] = {
    "loss.png": "Loss on the training batches and on held-out data. The dashed line, where there is"
    " one, is the loss of a trivial predictor. Marks at the bottom are the first logged steps after"
    " something was skipped.",
    "skipped.png": "Steps that were skipped, and micro-batches that were left out, since the start"
    " of the run.",
    "learning_rate.png": "Learning rate of each step.",
    "gradient_norm.png": "Norm of the whole gradient, on a log scale.",
    "critical_batch_size.png": "Estimated critical batch size: the gradient noise scale, converted"
    " to examples. A batch far below it wastes steps, one far above it wastes examples.",
    "trust_ratio.png": "Trust ratio of every adapted layer: the factor by which the optimizer"
    " scaled its update. Rows are layers; the layers of one stacked array are next to one another.",
    "parameter_norm.png": "Norm of the parameters of every layer, before the step.",
    "update_norm.png": "Norm of the update of every layer. For layers with a trust ratio it is the"
    " norm of the direction, before trust ratio and learning rate. If no layer has a trust ratio,"
    " it is the norm of the whole update.",
    "held_out_confusion.png": "What the words of each class are predicted to be, at the last"
    " evaluation, in percent of the words of the class.",
}

_HELD_OUT = "held_out_"  # the beginning of the file name of a plot of held-out metrics
_BY_CLASS = "_by_class"  # the end of the file name of a plot with a value for each class


class Plots:
    """Draws all plots after every evaluation."""

    def open(self, run: RunInfo) -> None:
        """Stores the description of the run."""
        self._run, self._drawn = run, False

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Does nothing."""

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Draws all plots again."""
        run, self._drawn = self._run, True
        seen = records.read(run.folder / "metrics.jsonl")
        write_all(seen, run.folder, baseline=run.baseline, loss_unit=run.loss_unit)

    def close(self, finished: bool) -> None:
        """Draws the plots of a run that was resumed after its last step."""
        if finished and not self._drawn:
            self.evaluate(self._run.total_steps, {})


def write_all(
    records: Records, folder: pathlib.Path, *, baseline: Baseline | None, loss_unit: str
) -> list[pathlib.Path]:
    """Writes every plot that has data into ``folder``, and returns their paths.

    Args:
      records: the metrics of the run.
      folder: the run folder.
      baseline: drawn as a dashed line where it has a value for the metric.
      loss_unit: the unit of the loss, for the axis.

    Raises:
      UserError: a file cannot be written.
    """

    def loss(records: Records, path: pathlib.Path) -> Figure | None:
        return lines.loss(records, path, baseline=baseline, unit=loss_unit)

    def held_out(name: str) -> Callable[[Records, pathlib.Path], Figure | None]:
        metric = name.partition("/")[0]
        if name.count("/") == 0:
            return lambda records, path: lines.held_out(records, name, path, baseline=baseline)
        kind = classes.by_class if name.count("/") == 1 else classes.matrix
        return lambda records, path: kind(records, metric, path)

    draw: dict[str, Callable[[Records, pathlib.Path], Figure | None]] = {
        "loss.png": loss,
        "skipped.png": lines.skipped,
        "learning_rate.png": lines.learning_rate,
        "gradient_norm.png": lines.gradient_norm,
        "critical_batch_size.png": lines.critical_batch_size,
        "trust_ratio.png": heat_maps.trust_ratio,
        "parameter_norm.png": heat_maps.parameter_norm,
        "update_norm.png": heat_maps.update_norm,
    }
    metrics = (name for name in records.held_out if name != "loss")
    draw |= {held_out_file(name): held_out(name) for name in metrics}
    return [folder / name for name, f in draw.items() if f(records, folder / name) is not None]


def held_out_file(metric: str) -> str:
    """Returns the file name of the plot that has a held-out metric.

    The metrics of all classes are in one plot, and so are the cells of a matrix.
    """
    name, *of_class = metric.split("/")
    return f"{_HELD_OUT}{name}{_BY_CLASS if len(of_class) == 1 else ''}.png"


def caption(file: str) -> str:
    """Returns the caption of the plot with a file name."""
    stem = pathlib.PurePath(file).stem
    if file in CAPTIONS or not stem.startswith(_HELD_OUT):
        return CAPTIONS.get(file, stem.replace("_", " "))
    metric = shown_name(stem.removeprefix(_HELD_OUT).removesuffix(_BY_CLASS)).replace("_", " ")
    metric = metric[:1].upper() + metric[1:]
    if stem.endswith(_BY_CLASS):
        return f"{metric} of each class on the held-out data, at the last evaluation."
    return f"{metric} on the held-out data, at every evaluation."
