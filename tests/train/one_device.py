"""Lets a run use one device, in a test process that has eight."""

from typing import Any

import jax
import pytest

from optim_zoo.train import job, loop, machine


class OneDevice:
    """Replaces the module jax in a run. It has one device, because eight are much slower."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)

    def devices(self) -> list[jax.Device]:
        return jax.devices()[:1]

    def device_count(self) -> int:
        return 1


def use_devices(patch: pytest.MonkeyPatch, replacement: Any) -> None:
    """Replaces jax by ``replacement`` in the modules that query devices."""
    for module in (loop, job, machine):
        patch.setattr(module, "jax", replacement)
