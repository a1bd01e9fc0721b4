"""Strict for every test: on the CPU, no silent rank promotion; warnings are errors (pyproject)."""

import os
from collections.abc import Iterator

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
# Eight, so that meshes of two axes can be made. Tests that use one device run no slower for it.
# `test_one_device.py` runs some of the tests again in a process that has only one.
jax.config.update("jax_num_cpu_devices", int(os.environ.get("OPTIM_ZOO_TEST_CPU_DEVICES", "8")))
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fails where pytest-xdist does not send the tests of a group to one worker.

    Their shared fixtures, which are whole runs, would silently be made once per worker.
    """
    if getattr(session.config.option, "loadgroup", False):
        for item in session.items:
            if item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
                raise pytest.UsageError(
                    f"pytest-xdist does not group tests with pytest {pytest.__version__}: install "
                    "the versions of constraints.txt"
                )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="module")
def quick_to_compile() -> Iterator[None]:
    """For modules whose time goes into compiling programs that run for a millisecond."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def _single_precision() -> Iterator[None]:
    """No test leaves float64 switched on for the next."""
    yield
    assert not jax.config.jax_enable_x64
