"""Runs of several processes: they start together, agree, and end together.

Every process runs the same program on its own devices. Process 0 also writes the run folder and
prints. Decisions such as stopping or saving must be the same in every process, because a process
that enters a collective operation alone waits for the others indefinitely. Each process therefore
computes a decision from the same replicated numbers, or they exchange it (`agreement`).

A run of one process calls the same functions; they return at once.
"""

from optim_zoo.train.distributed.agreement import (
    broadcast_from_first,
    check_same,
    check_shared,
    first_process_first,
    is_first,
    several,
    wait_for_all,
)
from optim_zoo.train.distributed.leaving import Processes
from optim_zoo.train.distributed.lock import alone_in
from optim_zoo.train.distributed.lost import LOST, Lost, watched
from optim_zoo.train.distributed.signals import SharedSignals, Signals, Stopped
from optim_zoo.train.distributed.starting import start

__all__ = [
    "LOST",
    "Lost",
    "Processes",
    "SharedSignals",
    "Signals",
    "Stopped",
    "alone_in",
    "broadcast_from_first",
    "check_same",
    "check_shared",
    "first_process_first",
    "is_first",
    "several",
    "start",
    "wait_for_all",
    "watched",
]
