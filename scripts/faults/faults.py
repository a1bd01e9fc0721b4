"""All faults by name."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import injected_faults as injected
import machine_faults as machine
from jobs import Failed, Site
from outcomes import Record


class Fault(NamedTuple):
    """A fault that can happen to a job."""

    title: str  # what the table calls it
    run: Callable[[Site], Record]  # makes it happen, and returns the record of what the job did
    variant: str = ""  # distinguishes faults with the same title


FAULTS: Mapping[str, Fault] = {
    "kills": Fault("`kill -9` at random moments", machine.kills),
    "sigterm": Fault("SIGTERM", machine.sigterm),
    "full_disk": Fault("the disk is full during a save", machine.full_disk),
    "full_disk_between": Fault(
        "the disk is filled up between two saves", machine.full_disk_between
    ),
    "truncated": Fault("a file of the last checkpoint is cut in half", machine.truncated),
    "flipped_byte": Fault("a byte of the last checkpoint is flipped", machine.flipped_byte),
    "two_jobs": Fault("a second job on the same run folder", machine.two_jobs),
    "nan_micro_batch": Fault(
        "NaN in one of the two micro-batches of a step", injected.nan_micro_batch
    ),
    **{
        f"nan_one_device_{name}": Fault(
            f"NaN in the gradient of one of {injected.DEVICES} devices",
            functools.partial(injected.nan_one_device, mode=mode),
            mode,
        )
        for name, mode in zip(("jit", "zero1", "shard_map", "pmap"), injected.MODES, strict=True)
    },
    "nan_step": Fault("NaN in one batch", injected.nan_step),
    "infinite_loss": Fault(
        f"an infinite loss for {injected.INFINITE} steps", injected.infinite_loss
    ),
    "infinite_loss_ends": Fault(
        f"the same with `guards.max_consecutive={injected.ALLOWED_SKIPS}`; the next start with "
        f"{2 * injected.INFINITE}",
        injected.infinite_loss_ends,
    ),
    "clock": Fault("the clock jumps back by a day, then on by two during a save", injected.clock),
}


def try_fault(site: Site, name: str) -> Record:
    """Makes a fault happen, and returns its record."""
    began = time.monotonic()
    fault = FAULTS[name]
    try:
        record = fault.run(site)
    except Failed as error:
        record = {"failed": str(error)}
    seconds = round(time.monotonic() - began, 1)
    named = {"fault": name, "title": fault.title, "variant": fault.variant}
    return {**named, **record, "seconds": seconds}
