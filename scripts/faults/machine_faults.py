"""Faults of the machine: killed processes, full disks, damaged files, two jobs in one folder."""

import contextlib
import functools
import math
import random
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jobs import LONG, LONG_SAVE_EVERY, LONG_STEPS, MIDDLE, SHORT, STEPS, Site
from outcomes import (
    UNBROKEN,
    Record,
    end,
    made,
    restarted,
    resumed,
    saved_steps,
    saving,
)

PAGE = 4096  # bytes; a file on a tmpfs takes a multiple of it


def kills(site: Site) -> Record:
    """Kills one run again and again, and starts it again each time.

    Every second kill happens during a save, and every fourth before the job has printed the step
    that it resumes from.
    """
    expected, folder, chance = site.finished(LONG), site.folder("kills"), site.random("kills")
    seconds = _seconds_to_start(site)
    killed: list[Record] = []
    for number in range(site.kills):
        job = site.start(folder, LONG)
        before = saved_steps(folder)[-1]
        if number % 4:
            reached = LONG_STEPS * number // (site.kills + 2) + chance.randrange(LONG_SAVE_EVERY)
            # Before that, the folder has the metrics and the unfinished save of the previous job.
            job.wait_for(job.has_begun)
            job.wait_for(functools.partial(_has_made, folder, reached))
            if number % 2:
                job.wait_for(lambda: saving(folder))
            time.sleep(chance.uniform(0, 0.1))
        else:
            job.wait_for(job.has_begun, at_most=chance.uniform(0, 1) * seconds)
        job.kill()
        ended = job.end()
        if killed:
            killed[-1] |= resumed(ended, folder)
        begun = job.has_begun()
        killed.append(
            {
                "exit_code": ended.code,
                "during": "a start" if not begun else "a save" if saving(folder) else "training",
                "made": max(made(folder), before) if begun else before,
                "saved": saved_steps(folder)[-1],
            }
        )
    last = site.run(folder, LONG)
    killed[-1] |= resumed(last, folder)
    # A job that was killed during its start has not printed the step that it resumes from. The next
    # one resumes from the same step.
    for kill, later in zip(killed[-2::-1], killed[:0:-1], strict=True):
        if later["during"] == "a start":
            kill["resumed_from"] = later["resumed_from"]
    landed = [kill for kill in killed if kill["exit_code"] == -signal.SIGKILL]
    lost = [kill["made"] - kill["resumed_from"] for kill in landed]
    return {
        "kills": killed,
        "landed": len(landed),
        "during": {
            when: sum(kill["during"] == when for kill in landed)
            for when in ("a save", "training", "a start")
        },
        "from_the_last_whole": all(kill["resumed_from"] == kill["saved"] for kill in landed),
        "lost": max(lost, default=0),
        "lost_median": statistics.median(lost) if lost else 0,
        "save_every": LONG_SAVE_EVERY,
        "next_exit_code": last.code,
        "next_said": last.sentence(folder),
        **end(folder, expected, UNBROKEN),
    }


def _has_made(folder: Path, steps: int) -> bool:
    return made(folder) >= steps


def _seconds_to_start(site: Site) -> float:
    """The seconds from the start of a job to its first step, on a machine that others use too."""
    folder = site.folder("start")
    began = time.monotonic()
    job = site.start(folder, LONG)
    job.wait_for(functools.partial(_has_made, folder, 1))
    seconds = time.monotonic() - began
    job.kill()
    return seconds


def sigterm(site: Site) -> Record:
    """Sends SIGTERM in the middle of the run."""
    site.finished()
    folder = site.folder("sigterm")
    job = site.start(folder, SHORT)
    job.wait_for(functools.partial(_has_made, folder, MIDDLE + 1))
    job.process.send_signal(signal.SIGTERM)
    return restarted(site, folder, job.end())


def full_disk(site: Site) -> Record:
    """Trains on a disk with room for 1.5 checkpoints, and enlarges it before the next start."""
    expected, folder = site.finished(), site.folder("full_disk")
    checkpoint = _pages(expected / "checkpoints" / str(STEPS))
    size = _pages(expected / "tokens") + checkpoint * 3 // 2
    with _small_disk(folder.parent, size) as problem:
        if problem:
            return {"skipped": problem}
        ended = site.run(folder, SHORT)
        resize = ["mount", "-o", f"remount,size={10 * size}", str(folder.parent)]
        subprocess.run(resize, check=True)
        return restarted(site, folder, ended)


def full_disk_between(site: Site) -> Record:
    """Fills the disk after a save, and frees it before the next start."""
    expected, folder = site.finished(), site.folder("full_disk_between")
    size = _pages(expected / "tokens") + 10 * _pages(expected / "checkpoints" / str(STEPS))
    with _small_disk(folder.parent, size) as problem:
        if problem:
            return {"skipped": problem}
        job = site.start(folder, SHORT)
        job.wait_for(lambda: saved_steps(folder)[-1] > 0 and not saving(folder))
        filler = folder.parent / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(PAGE)):
                pass
        ended = job.end()
        filler.unlink()
        return restarted(site, folder, ended)


def _pages(folder: Path) -> int:
    """Bytes that the files of a folder take on a tmpfs."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(PAGE * math.ceil(size / PAGE) for size in sizes)


@contextlib.contextmanager
def _small_disk(path: Path, size: int) -> Iterator[str]:
    """Mounts a tmpfs of ``size`` bytes on a folder; needs root.

    Yields "", or why no file system could be mounted.
    """
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
        problem = mounted.stderr.strip() if mounted.returncode else ""
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        yield f"no file system may be mounted here: {problem}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def truncated(site: Site) -> Record:
    """Cuts a file of the last checkpoint to half of its length."""
    return _damaged(site, "truncated", lambda content, _: content[: len(content) // 2])


def flipped_byte(site: Site) -> Record:
    """Flips all bits of one byte of the last checkpoint."""

    def flipped(content: bytearray, chance: random.Random) -> bytearray:
        content[chance.randrange(len(content))] ^= 0xFF
        return content

    return _damaged(site, "flipped_byte", flipped)


def _damaged(
    site: Site, fault: str, damaged: Callable[[bytearray, random.Random], bytearray]
) -> Record:
    """Damages the largest file of the last checkpoint of a finished run, and starts it again."""
    folder = shutil.copytree(site.finished(), site.folder(fault))
    files = [path for path in (folder / "checkpoints" / str(STEPS)).rglob("*") if path.is_file()]
    path = max(files, key=lambda path: (path.stat().st_size, path))
    path.write_bytes(damaged(bytearray(path.read_bytes()), site.random(fault)))
    before = {"made": made(folder), "saved": saved_steps(folder)[-2]}  # the last one is damaged
    after = resumed(site.run(folder, SHORT), folder)
    lost = before["made"] - after["resumed_from"]
    return {**before, **after, "lost": lost, **end(folder, site.finished(), UNBROKEN)}


def two_jobs(site: Site) -> Record:
    """Starts a second job on the run folder while the first one trains."""
    expected, folder = site.finished(LONG), site.folder("two_jobs")
    first = site.start(folder, LONG)
    first.wait_for(functools.partial(_has_made, folder, 1))
    second = site.run(folder, LONG)
    at = made(folder)
    ended = first.end()
    return {
        "exit_code": second.code,
        "said": second.sentence(folder),
        "first_at": at,
        "first_exit_code": ended.code,
        "first_said": ended.sentence(folder),
        "lost": LONG_STEPS - made(folder),
        **end(folder, expected, UNBROKEN),
    }
