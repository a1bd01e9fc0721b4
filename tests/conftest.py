"""Strict for every test: on the CPU, no silent rank promotion; warnings are errors (pyproject)."""

import os
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of compiled programs for this process and those that it starts with its variables.

    What is read from it is the program that was compiled, so that no number changes.
    """
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def _single_precision() -> Iterator[None]:
    """No test leaves float64 switched on for the next."""
    yield
    assert not jax.config.jax_enable_x64
