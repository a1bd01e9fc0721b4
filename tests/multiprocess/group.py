"""Starts several processes on this machine, each with virtual devices."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(devices: int) -> dict[str, str]:
    kept = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    own = {
        name: value
        for name, value in os.environ.items()
        if name in kept or not name.startswith(("JAX_", "XLA_", "TF_"))
    }
    flags = f"--xla_force_host_platform_device_count={devices}"
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling would take most of the time
    return {
        **own,
        **quick,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "PYTHONWARNINGS": "default",
    }


class Group:
    """Starts the processes of one run, and kills them on exit from the block."""

    def __init__(self, commands: Sequence[Sequence[str]], devices: int) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(devices),
            )
            for command in commands
        ]

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *error: Any) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def ends(self, seconds: float = 240) -> list[tuple[int, str, str]]:
        """Waits for all processes, and returns exit code, output and errors of each."""
        limit = time.monotonic() + seconds
        seen = []
        for process in self.processes:
            out, err = process.communicate(timeout=max(limit - time.monotonic(), 0.1))
            seen.append((process.returncode, out, err))
        return seen

    def wait_for(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + 200
        while not condition():
            if any(process.poll() is not None for process in self.processes):
                raise AssertionError(f"a process ended too early: {self.ends(60)}")
            assert time.monotonic() < limit
            time.sleep(0.01)
