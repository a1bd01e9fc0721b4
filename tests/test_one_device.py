"""Runs some tests again in a process with one device, as on a user's machine with one CPU.

All other tests run with eight virtual devices: see `conftest.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _run_with_one_device(*arguments: str) -> None:
    """Runs pytest with one CPU device; if a test fails, fails with its output."""
    environment = os.environ | {"OPTIM_ZOO_TEST_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr  # 5: no test was selected


def test_the_process_has_one_device() -> None:
    code = "import tests.conftest, jax; print(jax.device_count())"
    environment = os.environ | {"OPTIM_ZOO_TEST_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "1"


@pytest.mark.slow
def test_layerwise_optimizers_on_one_device() -> None:
    """Tests the optimizers that finish one leaf before they start the next on a CPU."""
    _run_with_one_device(
        "tests/test_recorded.py", "tests/test_containers.py",
        "-k", "(lamb or lars or larc) and (follows or one_device or partitioned)",
    )  # fmt: skip


@pytest.mark.slow
def test_leafwise_chains_on_one_device() -> None:
    _run_with_one_device(
        "tests/transforms/test_leafwise.py",
        "-k",
        "not several_devices and not mapped_context and not different_devices",
    )


@pytest.mark.slow
def test_every_recorded_trajectory_on_one_device() -> None:
    _run_with_one_device("tests/test_recorded.py")


@pytest.mark.slow
def test_every_container_on_one_device() -> None:
    _run_with_one_device("tests/test_containers.py", "-k", "not eight_devices")
