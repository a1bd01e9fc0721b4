"""What the errors of other libraries mean, where only their text says so.

JAX, Orbax and TensorStore raise the same type for many causes. XLA gives its errors a status code
(``error_code``), which is used where it is enough: it does not tell a lost process from a bug in a
collective, and an error that has passed through Python code, such as a callback, has lost it. The
others carry nothing but text, and where JAX's C++ aborts the process there is only its log.

This is the one file of the package that looks at the text of an exception or of a log;
``tests/test_errors.py`` holds that. Its strings were taken from JAX 0.10 to 0.12 and Orbax 0.12.
"""

import os
import re

import jax

# What collectives and barriers fail with when a process does not come; other errors are bugs.
_LOST_CODES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
_LOST_WORDS = re.compile(
    "|".join((*_LOST_CODES, "Gloo", "NCCL", "onnection", "arrier", "heartbeat"))
)
# What ``jax.distributed.initialize`` says without a cluster: a value is missing, or, in a program
# that has computed something, it is too late.
_ALONE = re.compile("should be defined|must be defined|must be called before")
_LONGEST = 200  # characters of a text that a message quotes


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a device has too little memory for a program."""
    status = "RESOURCE_EXHAUSTED"
    return error.error_code_string == status or status in str(error)


def is_lost_process(error: BaseException) -> bool:
    """Whether JAX raised the error because another process has failed or is gone."""
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    return error.error_code_string in _LOST_CODES or bool(_LOST_WORDS.search(str(error)))


def is_single_process(error: RuntimeError | ValueError) -> bool:
    """Whether ``jax.distributed.initialize`` was refused because there is no cluster."""
    return bool(_ALONE.search(str(error)))


def first_line(error: BaseException) -> str:
    """The first line of the text, shortened; the rest is for whoever debugs the library."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_LONGEST]


def why_not_written_or_read(error: BaseException) -> str:
    """What Orbax or TensorStore says; where that holds an error code of the system, its meaning."""
    # TensorStore names the failed file at length before it says what the system said.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else first_line(error).partition(". See full")[0]


def is_of_the_coordination_service(log: str) -> bool:
    """Whether JAX aborted the process because of the other processes, by the log of its C++."""
    return not log or "JAX distributed service" in log


def why_not_started(log: str, start_seconds: int) -> str:
    """Why the processes of a run did not come together, by the log of JAX's C++."""
    reasons = {
        "newer incarnation": "another one has the same distributed.index",
        "Unexpected task": "distributed.processes is smaller in the process of index 0",
        "DEADLINE_EXCEEDED": f"not all of them came in {start_seconds} s",
    }
    status = _status(log)
    return next((reason for text, reason in reasons.items() if text in status), status)


def why_lost(log: str) -> str:
    """Which process is lost or why, by the log of JAX's C++."""
    silent = re.search(r"stopped sending heartbeats\):\n((?:\d+\n)+)", log)
    if silent:
        return f"no heartbeat of process {', '.join(silent[1].split())}"
    if "Failed to send RPC to coordination service" in log:
        return "no answer from process 0"
    if "different incarnation" in log:
        return "another one was started with the same index"
    return _status(log)


def _status(log: str) -> str:
    """The reason that C++ gave for an abort."""
    said = re.search(r"absl::Status: (.*)", log)
    return said[1][:_LONGEST] if said else ""
