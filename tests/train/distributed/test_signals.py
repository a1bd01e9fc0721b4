"""Signals that one process receives; tests/train/test_loop.py sends them to whole runs."""

import copy
import os
import pickle
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from optim_zoo.train.distributed import Signals, Stopped

BOTH = (signal.SIGTERM, signal.SIGINT)
REPEATED = (signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.parametrize("number", REPEATED)
def test_sighup_and_sigusr1_may_be_repeated(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with Signals() as signals:
            for _ in range(3):
                os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.requested(1) == number  # the first signal
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_run_under_nohup_ignores_sighup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.requested(1) is None
    finally:
        signal.signal(signal.SIGHUP, before)


def wait_for_stderr(capfd: pytest.CaptureFixture[str]) -> str:
    """Waits for text on standard error, and returns it."""
    printed, limit = "", time.monotonic() + 20
    while not printed and time.monotonic() < limit:
        printed = capfd.readouterr().err
        time.sleep(0.01)
    return printed


@pytest.mark.parametrize(
    ("made", "saved"), [(None, "the first step"), (6, "step 7"), (9, "step 9")]
)
def test_ctrl_c_prints_a_message_while_the_main_thread_is_busy(
    made: int | None, saved: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another thread prints the message."""
    with Signals(last_step=9) as signals:
        if made is not None:
            assert signals.requested(made) is None
        os.kill(os.getpid(), signal.SIGINT)
        printed = wait_for_stderr(capfd)
        assert signals.requested(10) == signal.SIGINT
    assert printed == f"optim-zoo: saving {saved}, then leaving; Ctrl-C again leaves now\n"


def test_other_signals_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Signals():
        for number in (signal.SIGTERM, *REPEATED):
            os.kill(os.getpid(), number)
    assert capfd.readouterr().err == ""


# A program that prints after its terminal was closed, as a progress bar would.
CLOSED_TERMINAL = """
import fcntl, os, signal, sys, termios, time
from optim_zoo.train.distributed.signals import Signals
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
limit = time.monotonic() + 60
with Signals() as signals:
    print("ready", flush=True)
    while signals.requested(1) is None and time.monotonic() < limit:
        time.sleep(0.01)
    for _ in range(3):
        print("step", flush=True)
    print("step", file=sys.stderr, flush=True)
os.write(int(sys.argv[1]), str(signals.requested(2)).encode())
"""


def test_a_closed_terminal_requests_a_stop_without_ending_the_process() -> None:
    reader, writer = os.pipe()
    terminal, side_of_process = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED_TERMINAL, str(writer)],
        stdin=side_of_process,
        stdout=side_of_process,
        stderr=side_of_process,
        pass_fds=[writer],
        start_new_session=True,
    )
    os.close(writer)
    os.close(side_of_process)
    seen = b""
    while b"ready" not in seen:
        seen += os.read(terminal, 1024)
    os.close(terminal)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == str(int(signal.SIGHUP)).encode()
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_is_recorded_and_the_second_has_its_default_effect(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def default(*_: object) -> None:
        raise KeyboardInterrupt

    before = {each: signal.signal(each, default) for each in BOTH}
    try:
        with Signals() as signals:
            assert signals.requested(1) is None
            os.kill(os.getpid(), number)
            assert signals.requested(2) == signals.requested(3) == number
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        assert [signal.getsignal(each) for each in BOTH] == [default, default]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_handlers_are_set_only_in_the_main_thread() -> None:
    seen = []

    def run() -> None:
        with Signals() as signals:
            seen.append(signals.requested(1))

    before = [signal.getsignal(each) for each in BOTH]
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None]
    assert [signal.getsignal(each) for each in BOTH] == before


def test_stopped_names_the_signal_and_the_step() -> None:
    stopped = Stopped(signal.SIGTERM, 7, Path("runs/one"))
    expected = (
        "stopped by SIGTERM; step 7 is saved in runs/one, and the same command resumes from there"
    )
    for each in (stopped, copy.copy(stopped), pickle.loads(pickle.dumps(stopped))):
        assert str(each) == expected
