"""The processes of one run: they start together, agree, and end together.

Every process runs the same program on its own devices; the first one also writes and speaks. What
they decide (to stop, to save, that a loss is not finite) they decide from the same numbers, or one
waits for the others for ever.

Where a process is lost, JAX ends the others in one of two ways: a collective fails with a Python
error, at once or never, or JAX's C++ aborts the process when the heartbeats of the lost one stay
away. `watched` and `_LastWords` turn both into one sentence and an exit code.
"""

import contextlib
import ctypes
import hashlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from optim_zoo.errors import UserError
from optim_zoo.train import foreign_errors
from optim_zoo.train.config import Distributed
from optim_zoo.train.run_folder import saved_steps

LOST = os.EX_TEMPFAIL  # the exit code where another process is lost: starting again is the cure
NO_START = 2  # as for every mistake of the user's
# All processes leave within moments of each other; who has not come by then is not coming.
_LEAVING_SECONDS = 5


class Lost(Exception):
    """Another process of this run has failed or is gone.

    Args:
      folder: the run folder, which holds the checkpoints.
      reason: what is known about it, if anything.
    """

    def __init__(self, folder: Path, reason: str = "") -> None:
        super().__init__(folder, reason)  # for `pickle` and `copy`
        self.folder = folder
        self.reason = reason
        steps = saved_steps(folder)
        saved = f"step {steps[-1]} is saved in {folder}" if steps else "no checkpoint was saved"
        self.sentence = (
            f"another process of this run has failed or is gone{f' ({reason})' if reason else ''}; "
            f"{saved}: start all processes again, by the same commands, to go on from there"
        )

    def __str__(self) -> str:
        return self.sentence


# Starting


def start(settings: Distributed, folder: Path) -> None:
    """Joins the other processes, where the settings or the cluster name any.

    Must come before anything asks JAX for its devices.

    Raises:
      UserError: they do not come together.
    """
    if jax.distributed.is_initialized() or settings.processes == 1:
        return
    if settings.index > 0:
        _wait_for_coordinator(settings)
    with _LastWords(folder, settings) as last_words:
        if not _initialize(settings):
            return
        last_words.stay()
    if jax.default_backend() == "cpu":
        _silence_collectives()


def _initialize(settings: Distributed) -> bool:
    """Whether JAX now knows of other processes."""
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
            shutdown_timeout_seconds=_LEAVING_SECONDS,
            **explicit,
        )
    except (RuntimeError, ValueError) as error:
        asked = explicit or "JAX_COORDINATOR_ADDRESS" in os.environ
        if not asked and foreign_errors.is_single_process(error):
            return False
        reason = foreign_errors.first_line(error)
        raise UserError(f"[distributed] cannot start: {reason}") from error
    return True


def _wait_for_coordinator(settings: Distributed) -> None:
    """Returns when somebody listens there: JAX would abort the process instead of raising."""
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


def _silence_collectives() -> None:
    """Keeps the CPU's collectives from printing "[Gloo] Rank 0 is connected to ..."."""
    sys.stdout.flush()
    ours = os.dup(sys.stdout.fileno())
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    sys.stdout = os.fdopen(ours, "w", buffering=1, closefd=False)  # closed by the process's end


# Agreeing


def several() -> bool:
    """Whether this run has other processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if several():
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_one_first(name: str) -> Iterator[None]:
    """The other processes come in when the first is out: what it made they find made."""
    if not is_first():
        wait_for_all(name)
    yield
    if is_first():
        wait_for_all(name)


def as_the_first_says(value: bool) -> bool:
    """The value that the first process gives."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if several() else value


def check_same(values: Mapping[str, str]) -> None:
    """Raises `UserError` unless all processes give the same values."""
    if not several():
        return
    digests = [hashlib.sha256(value.encode()).digest()[:16] for value in values.values()]
    mine = np.frombuffer(b"".join(digests), np.uint32).reshape(len(values), -1)
    of_all = np.asarray(multihost_utils.process_allgather(mine))
    different = (of_all != of_all[:1]).any(axis=(0, 2))
    names = [name for name, differs in zip(values, different, strict=True) if differs]
    if names:
        raise UserError(
            f"the {' and '.join(names)} must be the same in every process, but differs: start all "
            f"with the same files and the same overrides, distributed.index apart"
        )


def check_shared(folder: Path) -> None:
    """Raises `UserError` unless the run folder is the same for all processes."""
    if not several():
        return
    path = folder / ".lock"
    if is_first():
        path.write_text(uuid.uuid4().hex)
    wait_for_all("the run folder is marked")
    mark = path.read_text() if path.exists() else ""
    try:
        check_same({"mark": mark})
    except UserError as error:
        raise UserError(
            f"the run folder {folder} must be one that all processes share, but they see different "
            f"ones: choose a folder on a shared file system with run.dir"
        ) from error


# Leaving


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Turns an error that a lost process has caused into `Lost`.

    Raises:
      Lost: see above.
    """
    try:
        yield
    except Exception as error:
        cause = _of_a_lost_one(error)
        if cause is None:
            raise
        raise Lost(folder, foreign_errors.first_line(cause)) from error


def _of_a_lost_one(error: BaseException | None) -> BaseException | None:
    """The error by which JAX tells that another process is lost, where that is the cause."""
    while error is not None and several():
        if foreign_errors.is_lost_process(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def leave(code: int, sentence: str) -> int:
    """Says the sentence, if any, and leaves with the other processes; returns the exit code.

    After a failure it does not return where there are other processes: JAX and Orbax would wait
    for them for minutes when Python ends.
    """
    if _LastWords.installed is not None:
        _LastWords.installed.say(code, sentence)
    elif sentence:
        print(sentence, file=sys.stderr)
    if not jax.distributed.is_initialized():
        return code
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if code != LOST:
        # Where all fail alike, all have their say before the end of one ends the others.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.distributed.shutdown()
    if code:
        os._exit(code)
    return code


class _LastWords:
    """Says why the process ends, also where JAX's C++ aborts it without asking Python.

    That is where no start comes about, and where the coordinator or the heartbeats of another
    process are gone. For SIGABRT a handler in Python would run too late; this one is called by C.
    C++ also logs the reason, and a stack. That goes to a file, from which the sentence is made;
    what else is written there is passed on when the process leaves. The environment variable
    TF_CPP_MIN_LOG_LEVEL leaves all of it where it was.
    """

    installed: "_LastWords | None" = None

    def __init__(self, folder: Path, settings: Distributed) -> None:
        self._folder, self._settings = folder, settings
        self._started = False
        self._speaking = threading.Lock()
        self._code: int | None = None  # once all is said
        self._written = tempfile.TemporaryFile()  # noqa: SIM115  instead of to standard error
        self._errors = os.dup(2)  # the true standard error
        self._libc = ctypes.CDLL(None)
        self._libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: self._aborted())

    def __enter__(self) -> "_LastWords":
        sys.stderr.flush()
        os.dup2(self._written.fileno(), 2)
        self._libc.signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._started:
            os.dup2(self._errors, 2)
            os.close(self._errors)
            self._written.close()
            self._libc.signal(signal.SIGABRT, None)  # what it was: end the process

    def stay(self) -> None:
        """Stays on guard after the start."""
        type(self).installed, self._started = self, True
        self._written.seek(0)
        self._written.truncate()
        if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") != "1":  # not JAX's own default
            os.dup2(self._errors, 2)
            return
        jax.config.update("jax_logging_level", "CRITICAL")
        sys.stderr = os.fdopen(self._errors, "w", buffering=1, closefd=False)

    def say(self, code: int, sentence: str) -> None:
        """The last sentence, if any, and the exit code from now on."""
        with self._speaking:
            os.write(self._errors, self._log().encode())
            if sentence:
                print(sentence, file=sys.stderr, flush=True)
            self._code = code

    def _log(self) -> str:
        """What has been written to the file."""
        return os.pread(self._written.fileno(), 1 << 20, 0).decode(errors="replace")

    def _aborted(self) -> None:
        # In any thread, while the main one may be speaking; not for ever, should it be stuck.
        self._speaking.acquire(timeout=_LEAVING_SECONDS)
        if self._code is not None:
            os._exit(self._code)
        log = self._log()
        if not foreign_errors.is_of_the_coordination_service(log):
            os.write(self._errors, log.encode())
            self._libc.signal(signal.SIGABRT, None)
            os.abort()
        if self._started:
            code, sentence = LOST, Lost(self._folder, foreign_errors.why_lost(log)).sentence
        else:
            code, sentence = NO_START, _no_start(log, self._settings)
        os.write(self._errors, f"optim-zoo: {sentence}\n".encode())
        os._exit(code)


def _no_start(log: str, settings: Distributed) -> str:
    reason = foreign_errors.why_not_started(log, settings.start_seconds)
    return (
        f"the processes did not come together ({reason}): start as many as distributed.processes "
        f"says, each with an index of its own from 0 on, and all with the same "
        f"distributed.coordinator"
    )
