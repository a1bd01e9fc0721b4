"""What the sections of ``gpu.sh`` share: facts in every line, time, memory and compilation."""

import importlib.metadata
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Protocol, TypeVar

import jax

import harness

Made = TypeVar("Made")

COMPILERS = 16  # programs compiled at the same time at most, and no more than there are cores
NO_TIME = "the section had no time left to compile it"
NO_TORCH = "torch is not installed"
PACKAGES = ("jax", "jaxlib", "optax", "flax", "torch", "timm")


def common(section: str) -> dict[str, Any]:
    """Returns the facts that a figure depends on: section, device and versions.

    A version is "" where the package is not installed.
    """
    return {
        "section": section,
        **harness.machine(),
        "platform": jax.default_backend(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def made_together(
    makers: Mapping[str, Callable[[], Made]], until: float = math.inf
) -> Iterator[tuple[str, Made | None]]:
    """Calls all ``makers`` on a few threads, and yields what each returns as soon as it does.

    XLA compiles outside Python's global lock, so that several programs are compiled at the same
    time. The compilation time of one of them is then not that of the program alone.

    Args:
      makers: functions that compile, keyed by name, the most important first.
      until: the ``time.monotonic()`` after which no further one starts; None is yielded for those.
    """

    def call(make: Callable[[], Made]) -> Made | None:
        return make() if time.monotonic() <= until else None

    with ThreadPoolExecutor(min(COMPILERS, len(os.sched_getaffinity(0)))) as pool:
        names = {pool.submit(call, make): name for name, make in makers.items()}
        for future in as_completed(names):
            yield names[future], future.result()


class Sized(Protocol):
    """A compiled step whose memory is known."""

    @property
    def held_bytes(self) -> int:
        """The bytes that the step keeps between calls."""
        ...

    @property
    def temporary_bytes(self) -> int:
        """The bytes that the step needs during a call."""
        ...


S = TypeVar("S", bound=Sized)


def fitting(steps: Mapping[str, S], held: float, common: Mapping[str, Any]) -> dict[str, S]:
    """Returns the ``steps`` that fit into memory together; prints a line for each of the others.

    Args:
      steps: compiled steps, the most important first.
      held: bytes that other arrays take.
      common: the facts in every line.
    """
    chosen: dict[str, S] = {}
    for name, step in steps.items():
        temporary = max(x.temporary_bytes for x in (step, *chosen.values()))
        lack = harness.lacking(held + step.held_bytes + temporary)
        if lack:
            show_skipped(name, f"with the candidates before it, it {lack}", common)
        else:
            chosen[name] = step
            held += step.held_bytes
    return chosen


def show_skipped(name: str, reason: str, common: Mapping[str, Any]) -> None:
    """Prints the line of a candidate that is not measured."""
    harness.show(name, common, {"measured": "skipped", "reason": reason})


class Clock:
    """The time limit of a section, on ``time.monotonic``."""

    def __init__(self, seconds: float) -> None:
        """Starts the clock.

        Args:
          seconds: from now until the section is stopped from outside.
        """
        self._began, self._seconds = time.monotonic(), seconds

    def at(self, share: float) -> float:
        """Returns the ``time.monotonic()`` at which this share of the time is used up."""
        return self._began + share * self._seconds
