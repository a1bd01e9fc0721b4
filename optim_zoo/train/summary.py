"""The headline figures of a run."""

import numpy as np

from optim_zoo.train import records
from optim_zoo.train.sinks.base import RunInfo


def summarize(run: RunInfo) -> dict[str, str]:
    """Returns the headline figures of a run by name, the most important first.

    They are read from ``metrics.jsonl``, so that those of a resumed run cover all of its steps.
    The result is empty before the first evaluation.
    """
    seen = records.read(run.folder / "metrics.jsonl")
    if not seen.held_out:
        return {}
    last = {name: values[-1] for name, (_, values) in seen.held_out.items()}
    step = int(seen.held_out["loss"][0][-1])
    figures = {f"held-out {name}": _with_unit(run, name, value) for name, value in last.items()}
    if run.baseline is not None:
        for name, value in run.baseline.metrics.items():
            figures[f"{name} by {run.baseline.name}"] = _with_unit(run, name, value)
        if "loss" in run.baseline.metrics:
            gain = run.baseline.metrics["loss"] - last["loss"]
            behind = f" (no better than {run.baseline.name} yet)" if gain <= 0 else ""
            figures["gain"] = _with_unit(run, "loss", gain) + behind
    figures["steps"] = f"{step:,} of {run.total_steps:,}"
    units = seen.train.get(run.unit, (np.empty(0), np.empty(0)))[1]
    if units.size:
        figures[run.unit.replace("_", " ")] = f"{int(units[-1]):,}"
    rates = seen.train.get(f"{run.unit}_per_second", (np.empty(0), np.empty(0)))[1]
    timed = rates[np.isfinite(rates)]
    median = f"{np.median(timed):,.0f} (median)" if timed.size else "not timed"
    figures[f"{run.unit.replace('_', ' ')} per second"] = median
    return figures


def _with_unit(run: RunInfo, name: str, value: float) -> str:
    unit = f" {run.loss_unit}" if name == "loss" and run.loss_unit else ""
    return f"{value:.4f}{unit}"
