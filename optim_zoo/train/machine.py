"""Describes the machine of a run, on which the last bits of its numbers may depend."""

import importlib.metadata
import os
import platform

import jax

import optim_zoo


def describe() -> dict[str, str]:
    """Returns the devices, the number of cores, the processor and the versions, by name."""
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
        "optim_zoo": optim_zoo.__version__,
    }


def memory() -> int | None:
    """Returns the bytes of main memory, or None if the system does not report them."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _cores() -> int | None:
    """Returns the number of cores that this process may use, or None if it is unknown."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
