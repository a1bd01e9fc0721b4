"""Interprets errors of other libraries whose meaning is only in their text.

JAX, Orbax and TensorStore raise the same type for many causes. XLA gives its errors a status code
(``error_code``), which is used where it is enough. It does not distinguish a lost process from a
bug in a collective operation, and an error that has passed through a Python callback has no code.
The other libraries give only text. If JAX's C++ code aborts the process, there is only its log.

No other file of the package reads the text of an exception or of a log; ``tests/test_errors.py``
checks this. The strings were taken from JAX 0.10 to 0.12 and Orbax 0.12.
"""

import os
import re

import jax

# The status codes of a collective operation or barrier that a process fails to reach. Any other
# status is a bug.
_LOST_CODES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
_LOST_WORDS = re.compile(
    "|".join((*_LOST_CODES, "Gloo", "NCCL", "onnection", "arrier", "heartbeat"))
)
# What ``jax.distributed.initialize`` says without a cluster: a value is missing, or the call comes
# too late because the program has already computed something.
_ALONE = re.compile("should be defined|must be defined|must be called before")
_LONGEST = 200  # the number of characters that a message quotes


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Returns whether a device has too little memory for a program."""
    status = "RESOURCE_EXHAUSTED"
    return error.error_code_string == status or status in str(error)


def is_lost_process(error: BaseException) -> bool:
    """Returns whether the cause of an error is another process that has failed or is gone."""
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    return error.error_code_string in _LOST_CODES or bool(_LOST_WORDS.search(str(error)))


def is_single_process(error: RuntimeError | ValueError) -> bool:
    """Returns whether ``jax.distributed.initialize`` failed because there is no cluster."""
    return bool(_ALONE.search(str(error)))


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, shortened."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_LONGEST]


def why_not_written_or_read(error: BaseException) -> str:
    """Returns why a file, such as one of a checkpoint, was not written or read.

    This is the meaning of the system's error code where the text has one, else its first line.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # TensorStore describes the file at length before it gives the error of the system.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else first_line(error).partition(". See full")[0]


def is_of_the_coordination_service(log: str) -> bool:
    """Returns whether JAX aborted because of other processes, given the log of its C++ code."""
    return not log or "JAX distributed service" in log


def why_not_started(log: str, start_seconds: int) -> str:
    """Returns why the processes of a run did not connect, given the log of JAX's C++ code."""
    reasons = {
        "newer incarnation": "another one has the same distributed.index",
        "Unexpected task": "distributed.processes is smaller in the process of index 0",
        "DEADLINE_EXCEEDED": f"not all of them came in {start_seconds} s",
    }
    status = _status(log)
    return next((reason for text, reason in reasons.items() if text in status), status)


def why_lost(log: str) -> str:
    """Returns which process is lost or why, given the log of JAX's C++ code."""
    silent = re.search(r"stopped sending heartbeats\):\n((?:\d+\n)+)", log)
    if silent:
        return f"no heartbeat of process {', '.join(silent[1].split())}"
    if "Failed to send RPC to coordination service" in log:
        return "no answer from process 0"
    if "different incarnation" in log:
        return "another one was started with the same index"
    return _status(log)


def _status(log: str) -> str:
    """Returns the reason for an abort from the log."""
    said = re.search(r"absl::Status: (.*)", log)
    return said[1][:_LONGEST] if said else ""
