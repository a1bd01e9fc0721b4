"""Runs these tests on the device that OPTIM_ZOO_TEST_DEVICE names: see test_gpu.py."""

import os
import sys
from pathlib import Path

import jax
import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))  # for hlo_kernels

DEVICE = os.environ.get("OPTIM_ZOO_TEST_DEVICE", "")
if DEVICE == "gpu":
    # tests/conftest.py has set the CPU. It remains the second platform, for comparison.
    jax.config.update("jax_platforms", "cuda,cpu")


@pytest.fixture
def device() -> jax.Device:
    """Returns the device under test, which is the default device of JAX."""
    if DEVICE not in ("gpu", "cpu"):
        pytest.skip("needs a GPU: OPTIM_ZOO_TEST_DEVICE=gpu pytest tests/gpu")
    # This fails instead of skipping, so that a run without a GPU does not look as if it passed.
    assert jax.default_backend() == DEVICE, "OPTIM_ZOO_TEST_DEVICE=gpu, but JAX finds no GPU"
    return jax.devices()[0]
