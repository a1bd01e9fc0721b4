"""Settings of every test: CPU devices, and an error for implicit rank promotion.

Warnings are errors too: see pyproject.toml.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests import cover, quick

jax.config.update("jax_platforms", "cpu")
# Eight devices allow meshes of two axes, and do not slow down tests that use one device.
# `test_one_device.py` runs some of the tests again in a process with one device.
jax.config.update("jax_num_cpu_devices", int(os.environ.get("OPTIM_ZOO_TEST_CPU_DEVICES", "8")))
jax.config.update("jax_numpy_rank_promotion", "raise")


# The files that take longest start first, so that the workers of pytest-xdist end together.
LONGEST = (
    "tests/scripts/test_faults.py",
    "tests/multiprocess/test_job.py",
    "tests/train/test_loop.py",
    "tests/wrappers/test_program_size.py",
    "tests/test_contract.py",
    "tests/cli/test_cli.py",
    "tests/test_one_device.py",
)


@pytest.hookimpl(tryfirst=True)  # before pytest selects tests by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests off the diagonal as slow, and puts the longest files first."""
    for item in items:
        if item.get_closest_marker("diagonal"):
            assert isinstance(item, pytest.Function)
            if cover.is_off_diagonal(item):
                item.add_marker(pytest.mark.slow)
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="module")
def quick_to_compile() -> Iterator[None]:
    """Turns off XLA optimizations, for modules that spend most of their time compiling."""
    with quick.everywhere():
        yield


@pytest.fixture
def leak_checks() -> Iterator[None]:
    """Makes ``jax.checking_leaks`` quick: it searches every object that gc has not frozen."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def fully_optimized(quick_to_compile: None) -> Iterator[None]:
    """Turns XLA's optimizations on again, for tests of the program that users get."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def _compiled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Workers do not share it, because JAX may read a file that another process is writing.
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled(_compiled_folder: Path) -> Iterator[None]:
    """Caches compiled programs for this process and for processes that inherit its environment.

    A program from the cache is the same as a newly compiled one, so no number changes.
    """
    options = {
        "jax_compilation_cache_dir": str(_compiled_folder),
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
