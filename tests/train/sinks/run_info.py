"""Makes the `RunInfo` with which tests open a sink."""

from pathlib import Path
from typing import Any

from optim_zoo.train.sinks.base import RunInfo


def run_info(folder: Path, **changes: Any) -> RunInfo:
    values: dict[str, Any] = {
        "folder": folder,
        "task": "masked_language",
        "config": {},
        "machine": {},
        "start": 0,
        "total_steps": 20,
        "unit": "tokens",
        "loss_unit": "nats",
        "baseline": None,
        "notes": [],
        **changes,
    }
    return RunInfo(**values)
