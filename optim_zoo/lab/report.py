"""The report of a sweep: one HTML page without references to other files, and its plots as PNG.

It shows what has ended, so that it may be written while a sweep runs.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from optim_zoo.errors import UserError
from optim_zoo.lab import comparisons, fits, plots, results
from optim_zoo.lab.comparisons import Group
from optim_zoo.lab.fits import Fit
from optim_zoo.lab.folder import BASE, About, read_about
from optim_zoo.train import machine, saved_config
from optim_zoo.train.sinks import report

_CAPTIONS = {
    "curves.png": "Held-out metric at the best learning rate of each optimizer: mean over the seeds"
    " in the middle of the band from the lowest to the highest. Time is that of training, without"
    " compiling, evaluating and saving. Dashed: the rate is at the edge of the tried ones.",
    "best.png": "The best of each optimizer and batch size (diamond: mean over the seeds, bar: from"
    " the lowest to the highest), with every run of every tried learning rate behind it. A hollow"
    " diamond is at the edge of the tried rates, where the best one may lie outside.",
    "sensitivity.png": "Held-out metric against the learning rate: mean over the seeds. A diamond"
    " is the best rate, if rates on both sides were tried. Bars at the bottom span the usable"
    " rates, at most 10 % worse than the best. Crosses at the top are rates with runs that diverged"
    " or failed.",
    "steps_to_target.png": "Steps until the held-out metric first reaches the target, at the best"
    " learning rate for each batch size: the fewest mean steps. Lines are the fit"
    " S(B) = S_min (1 + B_crit/B) to the full diamonds; a dotted line is at B_crit. Hollow: the"
    " rate with the fewest steps is at the edge of the tried ones.",
}


def write(folder: Path, target: float | None = None) -> Path:
    """Writes ``report.html`` and its plots into the folder of a sweep, and returns its path.

    Args:
      folder: the folder of the sweep, finished or not.
      target: the value of the metric for steps-to-target. By default the value that all seeds
        of every best rate reach.

    Raises:
      UserError: it is not the folder of a sweep, or no run has ended.
    """
    about, rows = read_about(folder), results.read_table(folder)
    if not rows:
        raise UserError(f"no run of {folder} has ended yet: start or continue the sweep")
    groups = comparisons.groups(rows, about)
    aim = _target(groups, target)
    steps, at_edge = _steps(groups, folder, aim)
    fitted = {label: fits.fit(by_batch) for label, by_batch in steps.items()}
    curves = {label: found for label, found in fitted.items() if isinstance(found, Fit)}
    drawn = {
        "curves.png": plots.curves(groups, folder, folder / "curves.png"),
        "best.png": plots.best(groups, folder / "best.png"),
        "sensitivity.png": plots.sensitivity(groups, folder / "sensitivity.png"),
        "steps_to_target.png": plots.steps_to_target(
            groups, steps, at_edge, curves, _aim(about, aim), folder / "steps_to_target.png"
        ),
    }
    ended = {status: sum(row["status"] == status for row in rows)
             for status in (results.FINISHED, results.DIVERGED, results.FAILED)}  # fmt: skip
    figures = {"runs": f"{len(rows)}", **{k: f"{n}" for k, n in ended.items() if n}}
    if about.search_runs:
        figures["rates per optimizer"] = f"{about.search_runs}"
    figures["steps per run"] = _span([row["steps"] for row in rows if row["steps"]])
    return report.write(
        folder,
        title=f"Sweep {Path(about.file).stem}: {about.metric}",
        figures=figures,
        plots=[folder / name for name, figure in drawn.items() if figure is not None],
        captions=_CAPTIONS,
        tables={
            "Best learning rates": [_best(group) for group in groups],
            f"Steps to {_aim(about, aim)}": [
                _fitted(label, steps[label], found) for label, found in fitted.items()
            ],
            "Runs that did not finish": [
                {key: row[key] for key in ("run", "status", "message")}
                for row in rows
                if row["status"] != results.FINISHED
            ],
        },
        config=saved_config.sections(saved_config.load(folder / BASE)),
        machine=machine.describe(),
    )


def _best(group: Group) -> Mapping[str, object]:
    """Returns the row of a group in the table of the best learning rates."""
    rate, usable = group.best_rate, group.usable
    values = group.values(rate) if rate is not None else np.empty(0)
    metric = group.about.metric
    return {
        "optimizer": group.label,
        "batch size": group.batch_size,
        "rates tried": len(group.scores),
        "best rate": "none"
        if rate is None
        else f"{rate:g}"
        if group.is_interior
        else "none inside",
        f"{metric} (mean)": f"{values.mean():.4f}" if values.size else "",
        "lowest to highest": f"{values.min():.4f} to {values.max():.4f}" if values.size else "",
        "seeds": len(values),
        "usable rates": _usable(usable) if usable else "",
        "note": group.note + (f" ({rate:g})" if rate is not None and group.note else ""),
    }


def _usable(usable: tuple[float, float]) -> str:
    low, high = usable
    return f"{low:g} to {high:g} (a factor of {high / low:.3g})" if high > low else f"{low:g} only"


def _fitted(label: str, steps: Mapping[int, Sequence[float]], fit: Fit | str) -> dict[str, object]:
    """Returns the row of an optimizer in the table of steps to the target."""
    mean = ", ".join(f"{batch:,}: {np.mean(steps[batch]):,.1f}" for batch in sorted(steps))
    row: dict[str, object] = {
        "optimizer": label,
        "batch size: steps": mean or "not reached at a tuned rate",
    }
    if isinstance(fit, str):
        return {**row, "S_min": "", "B_crit": "", "note": f"no fit: {fit}"}
    note = "" if fit.least_steps_interval else "no interval: it needs several seeds"
    return {
        **row,
        "S_min": _interval(fit.least_steps, fit.least_steps_interval),
        "B_crit": _interval(fit.critical_batch, fit.critical_batch_interval),
        "note": note,
    }


def _interval(value: float, interval: tuple[float, float] | None) -> str:
    more = f" (95 %: {interval[0]:.3g} to {interval[1]:.3g})" if interval else ""
    return f"{value:.3g}{more}"


def _aim(about: About, target: float) -> str:
    value = -target if about.higher_is_better else target
    return f"{about.metric} {value:.4g}"


def _span(values: Sequence[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _target(groups: Sequence[Group], target: float | None) -> float:
    """Returns the target, negated if a larger value of the metric is better."""
    sign = -1.0 if groups[0].about.higher_is_better else 1.0
    if target is not None:
        return sign * target
    values = [
        sign * value
        for group in groups
        if group.best_rate is not None
        for value in group.values(group.best_rate)
    ]
    return max(values, default=math.nan)


def _steps(
    groups: Sequence[Group], folder: Path, target: float
) -> tuple[dict[str, dict[int, list[float]]], dict[str, dict[int, list[float]]]]:
    """Returns the steps to the target of each optimizer, batch size and seed.

    They are those at the learning rate with the fewest mean steps, of the rates at which all seeds
    reach the target. The second result has those whose rate is at the edge of the tried ones.
    """
    tuned: dict[str, dict[int, list[float]]] = {}
    at_edge: dict[str, dict[int, list[float]]] = {}
    for group in groups:
        tuned.setdefault(group.label, {})
        at_edge.setdefault(group.label, {})
        found = {}
        for rate in group.scores:
            curves = [each for _, each in group.curves(folder, rate)]
            reached = [fits.crossing(each.steps, each.values, target) for each in curves]
            steps = [step for step in reached if step is not None]
            if steps and len(steps) == len(group.values(rate)):
                found[rate] = steps
        if found:
            best = min(found, key=lambda rate: float(np.mean(found[rate])))
            rates = list(group.scores)
            inside = best not in (rates[0], rates[-1])
            (tuned if inside else at_edge)[group.label][group.batch_size] = found[best]
    return tuned, at_edge


def folder_of(path: Path) -> Path:
    """Returns the folder of a sweep, which may also be named by its sweep file.

    Raises:
      UserError: the sweep file cannot be read.
    """
    if path.suffix != ".toml" or path.is_dir():
        return path
    from optim_zoo.lab import sweep_file

    return sweep_file.load(path).folder
