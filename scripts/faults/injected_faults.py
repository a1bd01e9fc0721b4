"""Faults that are injected into a job: NaN batches and gradients, infinite losses, clock jumps."""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from injection import Injection, batch_size
from jobs import MIDDLE, SAVE_EVERY, SHORT, STEPS, Ended, Site
from outcomes import (
    UNBROKEN,
    Record,
    end,
    lines,
    resumed,
    saved_steps,
    skipped_steps,
    stopped,
    trained,
)

INFINITE = 10  # consecutive infinite losses
ALLOWED_SKIPS = 5  # a limit that they exceed
DEVICES = 2  # virtual devices, where one of them gets a faulty gradient
MODES: Mapping[str, tuple[str, ...]] = {
    "jit": (),
    "jit, ZeRO-1": ("parallel.zero1=true",),
    "shard_map": ("parallel.mode=shard_map",),
    "pmap": ("parallel.mode=pmap",),
}


def nan_step(site: Site) -> Record:
    """One batch whose weights are NaN, so that its loss and gradient are NaN."""
    return _skipped(site, "nan_step", Injection("weights", (MIDDLE, MIDDLE + 1)))


def nan_micro_batch(site: Site) -> Record:
    """One of two micro-batches is NaN; compared with a run in which it has weight zero."""
    faulty = Injection("weights", (2 * MIDDLE, 2 * MIDDLE + 1))
    overrides, folder = (*SHORT, "accumulation.every=2"), site.folder("nan_micro_batch")
    job = site.start(folder, overrides, faulty)
    expected = site.finished(overrides, dataclasses.replace(faulty, value=0.0))
    ended = job.end()
    left_out = [line["skipped_micro_batches"] for line in trained(folder)]
    like = "a run in which it has no weight"
    return {
        "left_out": left_out[-1] if left_out else 0,
        **_survived(site, folder, ended, faulty, overrides, expected, like, fewer=0),
    }


def nan_one_device(site: Site, mode: str) -> Record:
    """One device has a NaN gradient and a finite loss.

    Args:
      site: where the jobs run.
      mode: a key of `MODES`.
    """
    size = batch_size(site.config, SHORT)
    rows = (size - size // DEVICES, size)  # those of the last device
    faulty = Injection("gradient", (MIDDLE, MIDDLE + 1), rows)
    fault = f"nan_one_device {mode}"
    return _skipped(site, fault, faulty, (*SHORT, *MODES[mode]), devices=DEVICES)


INFINITE_LOSS = Injection("loss", (MIDDLE, MIDDLE + INFINITE), value=math.inf)


def infinite_loss(site: Site) -> Record:
    """Infinite losses with finite gradients."""
    return _skipped(site, "infinite_loss", INFINITE_LOSS)


def infinite_loss_ends(site: Site) -> Record:
    """More infinite losses than the job allows; the next start allows more."""
    folder = site.folder("infinite_loss_ends")
    limit = f"guards.max_consecutive={ALLOWED_SKIPS}"
    job = site.start(folder, (*SHORT, limit), INFINITE_LOSS)
    expected = _without(site, INFINITE_LOSS, SHORT, devices=1)
    before = {**stopped(job.end(), folder), "skipped_steps": skipped_steps(folder)}
    larger = (*SHORT, f"guards.max_consecutive={2 * INFINITE}", "run.accept_changes=true")
    after = resumed(site.run(folder, larger, INFINITE_LOSS), folder)
    return {
        **before,
        **after,
        "lost": before["made"] - after["resumed_from"],
        **end(folder, expected, "a run without these batches", INFINITE),
    }


def clock(site: Site) -> Record:
    """The clock jumps back a day between two saves, and forward two days when a save has begun."""
    expected, folder, day = site.finished(), site.folder("clock"), 86400.0
    faulty = Injection(clock=((MIDDLE, -day), (2 * SAVE_EVERY, 2 * day)))
    ended = site.run(folder, SHORT, faulty)
    saves = [folder / "checkpoints" / str(step) for step in saved_steps(folder)[1:]]
    files = [save / "_CHECKPOINT_METADATA" for save in saves]
    dates = [json.loads(path.read_bytes())["init_timestamp_nsecs"] / 1e9 for path in files]
    return {
        "days_off": [
            round((date - path.stat().st_mtime) / day)
            for date, path in zip(dates, files, strict=True)
        ],
        "rates_are_positive": all(
            line["tokens_per_second"] > 0
            for line in lines(folder, rates=True)
            if line.get("tokens_per_second") is not None  # None at the first step, which compiles
        ),
        **_survived(site, folder, ended, faulty, SHORT, expected, UNBROKEN),
    }


def _skipped(
    site: Site,
    fault: str,
    faulty: Injection,
    overrides: tuple[str, ...] = SHORT,
    *,
    devices: int = 1,
) -> Record:
    """A run with faulty batches, compared with a run that never gets them."""
    folder = site.folder(fault)
    job = site.start(folder, overrides, faulty, devices=devices)
    expected = _without(site, faulty, overrides, devices=devices)
    fewer = faulty.batches[1] - faulty.batches[0]
    like = "a run without " + ("this batch" if fewer == 1 else "these batches")
    ended = job.end()
    return _survived(site, folder, ended, faulty, overrides, expected, like, fewer, devices)


def _survived(
    site: Site,
    folder: Path,
    ended: Ended,
    faulty: Injection,
    overrides: tuple[str, ...],
    expected: Path,
    like: str,
    fewer: int | None = None,
    devices: int = 1,
) -> Record:
    """The record of a run that should have reached its end, after starting it once more.

    If it did, a copy of the run without its last save is started again with the same faults, as
    though it had been killed before that save. If it did not, the run itself is started again,
    without faults.
    """
    record = stopped(ended, folder)
    if fewer is not None:
        record["skipped_steps"] = skipped_steps(folder)
    if ended.code:
        after = resumed(site.run(folder, overrides, devices=devices), folder)
        record |= {**after, "lost": record["made"] - after["resumed_from"]}
    else:
        cut = shutil.copytree(folder, folder.with_name("cut"))
        shutil.rmtree(cut / "checkpoints" / str(record["saved"]))
        record |= {"saved": saved_steps(cut)[-1], "lost": len(record.get("skipped_steps", []))}
        record |= resumed(site.run(cut, overrides, faulty, devices=devices), cut)
        record["next_same"] = end(cut, folder, "")["same"]
    return {**record, **end(folder, expected, like, fewer)}


def _without(site: Site, faulty: Injection, overrides: tuple[str, ...], *, devices: int) -> Path:
    """A run that is never given the faulty batches.

    It saves the step after which its parameters must equal those of the run with the faults.
    """
    first, after = faulty.batches
    served = dataclasses.replace(faulty, batches=(0, 0), left_out=faulty.batches)
    saved = f"output.checkpoint_every={STEPS - (after - first)}"
    return site.finished((*overrides, saved), served, devices=devices)
