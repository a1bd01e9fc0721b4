"""The headline figures of a run."""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from optim_zoo.errors import UserError
from optim_zoo.train import critical_batch_size, records, saved_params
from optim_zoo.train.checkpoint_records import Damaged
from optim_zoo.train.run_folder import BEST, CHECKPOINTS, saved_steps
from optim_zoo.train.sinks.base import RunInfo, shown_name


def summarize(run: RunInfo) -> dict[str, str]:
    """Returns the headline figures of a run by name, the most important first.

    They are read from ``metrics.jsonl``, so that those of a resumed run cover all of its steps.
    The result is empty before the first evaluation.
    """
    seen = records.read(run.folder / "metrics.jsonl")
    if not seen.held_out:
        return {}
    last = {name: values[-1] for name, (_, values) in seen.held_out.items() if "/" not in name}
    step = int(seen.held_out["loss"][0][-1])
    figures = {
        f"held-out {shown_name(name)}": _with_unit(run, name, value) for name, value in last.items()
    }
    best, last_saved = _recorded(run, BEST), _recorded(run, CHECKPOINTS).get("best", {})
    if best:
        shown = _with_unit(run, best["metric"], best["value"])
        figures[f"best {shown_name(best['metric'])}"] = f"{shown} at step {best['step']:,}"
    if run.baseline is not None:
        for name, value in run.baseline.metrics.items():
            figures[f"{shown_name(name)} by {run.baseline.name}"] = _with_unit(run, name, value)
        if "loss" in run.baseline.metrics:
            gain = run.baseline.metrics["loss"] - last["loss"]
            behind = f" (no better than {run.baseline.name} yet)" if gain <= 0 else ""
            figures["gain"] = _with_unit(run, "loss", gain) + behind
    stop_after = run.config.get("output", {}).get("stop_after", 0)
    stopped = 0 < stop_after <= last_saved.get("without_better", 0)
    why = f" (stopped: {stop_after} evaluations without a better value)" if stopped else ""
    if batch_size := critical_batch_size.describe(seen, run.weight_unit):
        figures["estimated critical batch size"] = batch_size
    figures["steps"] = f"{step:,} of {run.total_steps:,}{why}"
    units = seen.train.get(run.unit, (np.empty(0), np.empty(0)))[1]
    if units.size:
        figures[run.unit.replace("_", " ")] = f"{int(units[-1]):,}"
    rates = seen.train.get(f"{run.unit}_per_second", (np.empty(0), np.empty(0)))[1]
    timed = rates[np.isfinite(rates)]
    median = f"{np.median(timed):,.0f} (median)" if timed.size else "not timed"
    figures[f"{run.unit.replace('_', ' ')} per second"] = median
    return figures


def _recorded(run: RunInfo, name: str) -> Mapping[str, Any]:
    """Returns what is recorded with the last step in a folder; empty where nothing is kept."""
    steps = saved_steps(run.folder, name)
    if steps and run.config.get("output", {}).get("keep_best"):
        with contextlib.suppress(UserError, Damaged):
            return saved_params.info(run.folder / name / str(steps[-1]))
    return {}


def _with_unit(run: RunInfo, name: str, value: float) -> str:
    unit = f" {run.loss_unit}" if name == "loss" and run.loss_unit else ""
    return f"{value:.4f}{unit}"
