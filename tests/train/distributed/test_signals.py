"""Signals that one process receives; tests/train/test_loop.py sends them to whole runs."""

import copy
import os
import pickle
import signal
import threading
from pathlib import Path

import pytest

from optim_zoo.train.distributed import Signals, Stopped

BOTH = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_recorded_and_a_second_one_has_its_usual_effect(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usual(*_: object) -> None:
        raise KeyboardInterrupt

    before = {each: signal.signal(each, usual) for each in BOTH}
    try:
        with Signals() as signals:
            assert signals.requested(1) is None
            os.kill(os.getpid(), number)
            assert signals.requested(2) == signals.requested(3) == number
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        assert [signal.getsignal(each) for each in BOTH] == [usual, usual]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_another_thread_sets_no_handler() -> None:
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
