"""The device these tests run on is the one OPTIM_ZOO_TEST_DEVICE names: see test_gpu.py."""

import os
import sys
from pathlib import Path

import jax
import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))  # for hlo_kernels

DEVICE = os.environ.get("OPTIM_ZOO_TEST_DEVICE", "")
if DEVICE == "gpu":
    # The conftest above this one has set the CPU, for all other tests. It stays, second, as what
    # the GPU is compared with.
    jax.config.update("jax_platforms", "cuda,cpu")


@pytest.fixture
def device() -> jax.Device:
    """The device under test, which is JAX's default."""
    if DEVICE not in ("gpu", "cpu"):
        pytest.skip("needs a GPU: OPTIM_ZOO_TEST_DEVICE=gpu pytest tests/gpu")
    # Not skipped: who asks for a GPU must not take a run without one for a passed one.
    assert jax.default_backend() == DEVICE, "OPTIM_ZOO_TEST_DEVICE=gpu, but JAX finds no GPU"
    return jax.devices()[0]
