"""Errors of other libraries are recognized. Most tests make the library raise the error."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from optim_zoo.train import foreign_errors


def test_out_of_memory_is_recognized_by_the_status_code() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jnp.zeros(1 << 50)
    assert caught.value.error_code_string == "RESOURCE_EXHAUSTED"
    assert foreign_errors.is_out_of_memory(caught.value)
    assert not foreign_errors.is_lost_process(caught.value)


def test_out_of_memory_is_recognized_by_the_text_if_the_code_is_missing() -> None:
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    assert error.error_code_string == "UNKNOWN"
    assert foreign_errors.is_out_of_memory(error)
    assert not foreign_errors.is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: a bug"))


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("UNKNOWN: Gloo all-reduce failed: Connection closed by peer", True),
        ("DEADLINE_EXCEEDED: Barrier timed out", True),
        ("UNAVAILABLE: socket closed", True),
        ("INTERNAL: NCCL operation failed", True),
        ("INVALID_ARGUMENT: a bug", False),
        ("RESOURCE_EXHAUSTED: memory", False),
    ],
)
def test_a_lost_process_is_recognized(text: str, lost: bool) -> None:
    assert foreign_errors.is_lost_process(jax.errors.JaxRuntimeError(text)) == lost
    assert not foreign_errors.is_lost_process(RuntimeError(text))  # not an error of the runtime


def test_an_initialized_backend_is_recognized() -> None:
    jnp.zeros(1)
    with pytest.raises(RuntimeError) as caught:
        jax.distributed.initialize()
    assert foreign_errors.is_single_process(caught.value)
    assert not foreign_errors.is_single_process(RuntimeError("UNAVAILABLE: no coordinator"))


def test_a_machine_without_a_cluster_is_recognized() -> None:
    code = (
        "import jax\n"
        "from optim_zoo.train import foreign_errors\n"
        "try:\n"
        "    jax.distributed.initialize()\n"
        "except ValueError as error:\n"
        "    print(foreign_errors.is_single_process(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_an_error_text_is_shortened_to_one_line() -> None:
    assert foreign_errors.first_line(ValueError("one\ntwo")) == "one"
    assert foreign_errors.first_line(AssertionError()) == "AssertionError"
    assert len(foreign_errors.first_line(ValueError("x" * 999))) == 200


def test_the_reason_of_a_system_error_is_extracted() -> None:
    error = ValueError("FAILED: writing '/a/b' [os_error_code='28' os_error_name='ENOSPC']\nmore")
    assert foreign_errors.why_not_written_or_read(error) == "No space left on device"
    error = ValueError("no such item. See full log at /tmp/log\nmore")
    assert foreign_errors.why_not_written_or_read(error) == "no such item"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("x absl::Status: ALREADY_EXISTS: newer incarnation y", "another one has the same"),
        ("absl::Status: Unexpected task 3", "distributed.processes is smaller"),
        ("absl::Status: DEADLINE_EXCEEDED: no", "not all of them came in 7 s"),
        ("absl::Status: INTERNAL: other\nmore", "INTERNAL: other"),
        ("", ""),
    ],
)
def test_the_reason_of_a_failed_start_is_extracted_from_the_log(log: str, reason: str) -> None:
    assert foreign_errors.why_not_started(log, 7).startswith(reason)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("(they stopped sending heartbeats):\n1\n3\nmore", "no heartbeat of process 1, 3"),
        ("Failed to send RPC to coordination service", "no answer from process 0"),
        ("a different incarnation", "another one was started with the same index"),
        ("absl::Status: INTERNAL: other", "INTERNAL: other"),
        ("", ""),
    ],
)
def test_the_reason_of_a_lost_process_is_extracted_from_the_log(log: str, reason: str) -> None:
    assert foreign_errors.why_lost(log) == reason


def test_other_aborts_are_not_attributed_to_the_coordination_service() -> None:
    assert foreign_errors.is_of_the_coordination_service("")
    assert foreign_errors.is_of_the_coordination_service("the JAX distributed service detected")
    assert not foreign_errors.is_of_the_coordination_service("double free or corruption")
