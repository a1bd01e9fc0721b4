"""How a process joins the other processes of its run.

1. The other processes wait until the coordinator, process 0, accepts connections.
2. The handler of SIGABRT is installed (`abort_handler`), because JAX aborts the process where the
   start fails in C++.
3. `jax.distributed.initialize` connects the processes.
4. From then on an abort means that another process is lost.
5. On the CPU, standard output of C++ is silenced.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from optim_zoo.errors import UserError
from optim_zoo.train import foreign_errors
from optim_zoo.train.config import Distributed
from optim_zoo.train.distributed.abort_handler import AbortHandler
from optim_zoo.train.distributed.leaving import Processes
from optim_zoo.train.distributed.lost import LOST, Lost

NOT_STARTED = 2  # the exit code of every mistake that the user can correct
# How long `jax.distributed.shutdown` waits for the other processes. All leave within moments of
# each other, so that one which has not come by then has failed.
_SHUTDOWN_SECONDS = 5


def start(settings: Distributed, folder: Path) -> Processes:
    """Joins the other processes of the run, if the settings or the cluster name any.

    Must be called before anything asks JAX for its devices.

    Args:
      settings: section ``distributed`` of the config.
      folder: the run folder, which a message about a lost process names.

    Returns:
      A context manager to run the training in. Its `leave` ends this process's part in the run.

    Raises:
      UserError: the processes cannot connect.
    """
    if jax.distributed.is_initialized() or settings.processes == 1:
        return Processes()
    if settings.index > 0:
        _wait_for_coordinator(settings)
    with contextlib.ExitStack() as restore:
        handler = restore.enter_context(AbortHandler(lambda log: _not_started(log, settings)))
        if not _initialize(settings):
            handler.pass_on_log()
            return Processes()
        handler.explain = lambda log: _lost(log, folder)
        handler.discard_log()  # such as failed attempts to connect
        if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # JAX sets 1 where it is unset.
            restore.enter_context(_without_jax_logging())
        else:  # The user wants to see the log of C++.
            handler.show_log()
        if jax.default_backend() == "cpu":
            restore.enter_context(_without_output_of_c())
        return Processes(handler, restore.pop_all())


def _initialize(settings: Distributed) -> bool:
    """Connects the processes; returns False where there is only this one."""
    explicit: dict[str, Any] = {}
    if settings.coordinator:
        explicit = {
            "coordinator_address": settings.coordinator,
            "num_processes": settings.processes,
            "process_id": settings.index,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(
            initialization_timeout=settings.start_seconds,
            heartbeat_timeout_seconds=settings.heartbeat_seconds,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            **explicit,
        )
    except (RuntimeError, ValueError) as error:
        requested = explicit or "JAX_COORDINATOR_ADDRESS" in os.environ
        if not requested and foreign_errors.is_single_process(error):
            return False
        reason = foreign_errors.first_line(error)
        raise UserError(f"[distributed] cannot start: {reason}") from error
    return True


def _wait_for_coordinator(settings: Distributed) -> None:
    """Returns when the coordinator accepts connections; JAX would abort instead of raising."""
    host, _, port = settings.coordinator.rpartition(":")
    limit = time.monotonic() + settings.start_seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > limit:
                raise UserError(
                    f"the coordinator {settings.coordinator} was not reached in "
                    f"{settings.start_seconds} s ({error.strerror or error}): start the process of "
                    f"distributed.index=0 on that host, or correct distributed.coordinator"
                ) from error
            time.sleep(0.2)


def _not_started(log: str, settings: Distributed) -> tuple[int, str] | None:
    """Explains an abort during the start."""
    if not foreign_errors.is_of_the_coordination_service(log):
        return None
    reason = foreign_errors.why_not_started(log, settings.start_seconds)
    return NOT_STARTED, (
        f"optim-zoo: the processes did not come together ({reason}): start as many processes as "
        f"distributed.processes says, each with its own distributed.index from 0 on, and all with "
        f"the same distributed.coordinator"
    )


def _lost(log: str, folder: Path) -> tuple[int, str] | None:
    """Explains an abort after the start."""
    if not foreign_errors.is_of_the_coordination_service(log):
        return None
    return LOST, f"optim-zoo: {Lost(folder, foreign_errors.why_lost(log))}"


@contextlib.contextmanager
def _without_jax_logging() -> Iterator[None]:
    """Silences JAX's own messages about the other processes, which `Lost` repeats in a sentence."""
    before = jax.config.jax_logging_level  # type: ignore[attr-defined]
    jax.config.update("jax_logging_level", "CRITICAL")
    try:
        yield
    finally:
        jax.config.update("jax_logging_level", before)


@contextlib.contextmanager
def _without_output_of_c() -> Iterator[None]:
    """Hides what C++ prints, such as Gloo's "[Gloo] Rank 0 is connected to 1 peer ranks".

    File descriptor 1 leads nowhere, and `sys.stdout` writes to a duplicate of the original one.
    """
    python_stdout = sys.stdout
    python_stdout.flush()
    descriptor = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    sys.stdout = os.fdopen(descriptor, "w", buffering=1, closefd=False)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        sys.stdout = python_stdout
        os.dup2(descriptor, 1)
        os.close(descriptor)
