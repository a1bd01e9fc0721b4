"""Settings of every test: CPU devices, and an error for implicit rank promotion.

Warnings are errors too: see pyproject.toml.
"""

import gc
import os
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_platforms", "cpu")
# Eight devices allow meshes of two axes, and do not slow down tests that use one device.
# `test_one_device.py` runs some of the tests again in a process with one device.
jax.config.update("jax_num_cpu_devices", int(os.environ.get("OPTIM_ZOO_TEST_CPU_DEVICES", "8")))
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fails where pytest-xdist does not send the tests of a group to one worker.

    Otherwise every worker would silently repeat the shared fixtures, which are whole runs.
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
    """Turns off XLA optimizations, for modules that spend most of their time compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def leak_checks() -> Iterator[None]:
    """Makes ``jax.checking_leaks`` quick: it searches every object that gc has not frozen."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches compiled programs for this process and for processes that inherit its environment.

    A program from the cache is the same as a newly compiled one, so no number changes.
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
    """Turns float64 off after each test."""
    yield
    assert not jax.config.jax_enable_x64
