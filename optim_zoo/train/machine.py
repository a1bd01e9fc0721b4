"""The machine that a run is on: its numbers may depend on it to the last bit."""

import importlib.metadata
import os
import platform

import jax


def describe() -> dict[str, str]:
    """Returns devices, cores, processor and versions, by name."""
    devices = jax.devices()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax", "flax")]
    count = jax.process_count()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}"
        + (f" in {count} processes" if count > 1 else ""),
        "cores": str(_cores()),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "libraries": ", ".join(versions),
        "optim_zoo": _own_version(),
    }


def _own_version() -> str:
    try:
        return importlib.metadata.version("optim-zoo")
    except importlib.metadata.PackageNotFoundError:  # used by PYTHONPATH, without being installed
        return "from a checkout"


def _cores() -> int | None:
    """The cores this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
