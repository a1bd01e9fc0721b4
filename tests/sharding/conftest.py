from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture
def params(rng: np.random.Generator) -> Any:
    return {
        "hidden": jnp.asarray(rng.normal(size=(4, 5)), "float32"),
        "out": jnp.asarray(rng.normal(size=(5, 2)), "float32"),
    }


@pytest.fixture
def batches(rng: np.random.Generator) -> list[Any]:
    """Weights so uneven that a mean of means is wrong: some devices may have no weight."""
    return [
        {
            "x": rng.normal(size=(16, 4)).astype(np.float32),
            "y": rng.normal(size=(16, 2)).astype(np.float32),
            "weight": np.float32(rng.integers(1, 9, 16) * (np.arange(16) % 5 < 2)),
        }
        for _ in range(3)
    ]


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """A list that grows by one for every program that XLA compiles during the test."""
    compiled: list[str] = []

    def listener(event: str, *_: Any, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listener)
