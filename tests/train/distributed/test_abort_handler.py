"""What a process prints and how it ends when C++ code aborts it. Each test starts a process."""

import signal
import subprocess
import sys

START = """
import ctypes, os, signal, sys, threading
from optim_zoo.train.distributed.abort_handler import AbortHandler

def explain(log):
    return (75, f"reason: {log.strip()}") if "lost" in log else None

def log(text):
    "As C++ does."
    os.write(2, f"{text}\\n".encode())

def abort():
    "In a thread that has no Python code, as C++ does."
    starts = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    libc = ctypes.CDLL(None)
    thread = ctypes.c_ulong()
    libc.pthread_create(ctypes.byref(thread), None, ctypes.cast(libc.abort, ctypes.c_void_p), None)
    libc.pthread_join(thread, None)
"""


def run(program: str) -> tuple[int, str]:
    """Runs a program, and returns its exit code and standard error."""
    command = [sys.executable, "-c", START + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_an_explained_abort_prints_one_sentence_and_sets_the_exit_code() -> None:
    program = (
        "handler = AbortHandler(explain)\n"
        "log('of the start')\nhandler.discard_log()\n"
        "print('from Python', file=sys.stderr)\n"
        "log('process 1 is lost')\nabort()\n"
    )
    assert run(program) == (75, "from Python\nreason: process 1 is lost\n")


def test_an_unexplained_abort_keeps_its_log_and_its_signal() -> None:
    program = "handler = AbortHandler(explain)\nlog('corruption')\nabort()\n"
    assert run(program) == (-signal.SIGABRT, "corruption\n")


def test_an_abort_after_the_final_line_changes_nothing() -> None:
    program = (
        "handler = AbortHandler(explain)\nlog('noise')\nhandler.say(3, 'the end')\n"
        "log('process 1 is lost')\nabort()\n"
    )
    assert run(program) == (3, "noise\nthe end\n")


def test_the_final_line_replaces_the_log_of_an_imminent_abort() -> None:
    program = (
        "handler = AbortHandler(explain)\nlog('process 1 is lost')\n"
        "handler.say(3, 'a collective has failed')\nabort()\n"
    )
    assert run(program) == (3, "a collective has failed\n")


def test_closing_restores_standard_error_and_the_handler() -> None:
    program = (
        "before = sys.stderr\n"
        "with AbortHandler(explain) as handler:\n"
        "    log('passed on')\n    handler.pass_on_log()\n    log('hidden')\n"
        "assert sys.stderr is before\n"
        "log('1')\nprint('2', file=sys.stderr, flush=True)\nlog('process 1 is lost')\nabort()\n"
    )
    assert run(program) == (-signal.SIGABRT, "passed on\n1\n2\nprocess 1 is lost\n")
