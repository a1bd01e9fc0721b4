"""Faults that a job must survive: each really happens to one, and what it does is told in a table.

    python scripts/faults.py [FAULT ...] [--table] [--kills 20] [--seed 0] [--config FILE]

Prints one JSON line a fault and, with ``--table``, a Markdown table made of nothing but these
lines. The jobs are the user's command in processes of their own, on the CPU, at the size of
``configs/smoke.toml`` but a few steps, on the source text of this package. What they leave is
compared to the last bit with an unbroken run; after steps that were refused, with a run that is
never served those batches.

Batches, gradients, losses and the clock are spoilt from within: the process is then this script,
which wraps the job's task and calls the command line with the same arguments. The clock that jumps
is the wall clock as Python code reads it, ``time.time`` and ``time.time_ns``; a monotonic clock
does not jump on a real machine either. A full disk is a small tmpfs, which takes root to mount; no
other fault does.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from optim_zoo import cli
from optim_zoo.train import config_file, tasks
from optim_zoo.tree import Tree

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "configs" / "smoke.toml"
STEPS, SAVE_EVERY = 20, 5
SHORT = (
    f"train.steps={STEPS}",
    "train.batch_size=8",
    "output.log_every=1",
    "output.evaluation_batches=1",
    f"output.evaluate_every={STEPS}",
    f"output.checkpoint_every={SAVE_EVERY}",
)
LONG_STEPS, LONG_SAVE_EVERY = 400, 20
# Longer than a process takes to start; in steps so small that a save goes on during many of them.
LONG = (
    f"train.steps={LONG_STEPS}",
    "train.batch_size=8",
    "model.num_layers=1",
    "output.log_every=1",
    "output.evaluation_batches=1",
    "output.evaluate_every=150",
    f"output.checkpoint_every={LONG_SAVE_EVERY}",
)
STRUCK = 7  # the number of the batch that is spoilt, from 0; SHORT saves before and after it
INFINITE = 10  # so many losses from there on
BORNE = 5  # a limit that these exceed
DEVICES = 2  # virtual ones, where one of them is spoilt
MODES: Mapping[str, tuple[str, ...]] = {
    "jit": (),
    "jit, ZeRO-1": ("parallel.zero1=true",),
    "shard_map": ("parallel.mode=shard_map",),
    "pmap": ("parallel.mode=pmap",),
}
PAGE = 4096  # bytes of a tmpfs that a file takes at least
LIMIT = 600.0  # seconds after which a job counts as stuck

Record = dict[str, Any]


# Within the job's process


@dataclasses.dataclass(frozen=True)
class Spoilt:
    """What is wrong with the batches that a job is served."""

    what: str = ""  # "weights", or a factor of the "gradient", or a summand of the "loss"
    batches: tuple[int, int] = (0, 0)  # their numbers, from 0; the first, and the one after
    rows: tuple[int, int] = (0, 1 << 30)  # of these batches
    value: float = math.nan  # times the weights, times the gradient, or added to the loss
    left_out: tuple[int, int] = (0, 0)  # batches never served; in their place come those after
    # [batch, seconds]: when it is asked for, the clock is put forward by so many
    clock: tuple[tuple[int, float], ...] = ()

    def task(self, task: tasks.Task) -> tasks.Task:
        """The task with such batches."""
        if self.clock:
            _put_forward(0.0)
        neutral = 0.0 if self.what == "loss" else 1.0
        at = dict(self.clock)

        def batch(number: int, stage: Any) -> Tree:
            if number in at:
                _put_forward(at[number])
            first, after = self.left_out
            made = task.batch(number + (after - first if number >= first else 0), stage)
            wrong = np.full(len(made["masked_weights"]), neutral, np.float32)
            if self.batches[0] <= number < self.batches[1]:
                wrong[slice(*self.rows)] = self.value
            if self.what == "weights":
                return {**made, "masked_weights": made["masked_weights"] * wrong[:, None]}
            return {**made, "wrong": wrong} if self.what else made

        def loss(params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
            total, weight = task.loss(params, batch)
            if self.what == "gradient":
                total = _times_backwards(total, jnp.max(batch["wrong"]))
            elif self.what == "loss":
                total += jnp.sum(batch["wrong"])
            return total, weight

        return dataclasses.replace(task, batch=batch, loss=loss)


@jax.custom_vjp
def _times_backwards(x: jax.Array, factor: jax.Array) -> jax.Array:
    """``x``, whose gradient is multiplied by ``factor``."""
    return x


_times_backwards.defvjp(
    lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor))
)


def _put_forward(seconds: float) -> None:
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


def within(spoilt: str, arguments: Sequence[str]) -> int:
    """The user's command with spoilt batches, in this process."""
    task = Spoilt(**json.loads(spoilt)).task
    make = tasks.make
    tasks.make = lambda config, folder: task(make(config, folder))
    return cli.main(arguments)


# The jobs


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


class Failed(Exception):
    """What a fault is compared with cannot be had."""


class Job:
    """A process that trains.

    Args:
      command: what is run.
      environment: its variables.
      said: where what it prints goes, into files: a pipe that nobody reads fills up.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], said: Path) -> None:
        self._out, self._err = said.with_suffix(".out"), said.with_suffix(".err")
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)

    def goes_on(self) -> bool:
        """Whether it has made a step, or said from which it goes on."""
        return "step " in self._out.read_text()

    def wait_for(self, condition: Callable[[], bool], *, at_most: float = math.inf) -> None:
        """Returns when it holds, the process has ended, or so many seconds have passed.

        Raises:
          Failed: none of these in `LIMIT` seconds.
        """
        began = time.monotonic()
        while not condition() and self.process.poll() is None:
            waited = time.monotonic() - began
            if waited > at_most:
                return
            if waited > LIMIT:
                raise Failed(f"what was waited for did not come in {LIMIT:g} s")
            time.sleep(0.005)

    def end(self) -> Ended:
        """Waits for the end."""
        try:
            self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise Failed(f"the job did not end in {LIMIT:g} s") from None
        finally:
            self.kill()
        return Ended(self.process.returncode, self._out.read_text(), self._err.read_text())

    def kill(self) -> None:
        """``kill -9``."""
        self.process.kill()
        self.process.wait()


class Site:
    """A folder to work in, and the jobs that run there; a context manager that ends them.

    Args:
      work: the folder, empty.
      config: of the jobs, beside `SHORT` and `LONG`.
      kills: how many there are of `kills`.
      seed: of what is random.
      environment: of the jobs, beside what makes them quick and alike.
    """

    def __init__(
        self,
        work: Path,
        config: Path,
        *,
        kills: int = 20,
        seed: int = 0,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.work, self.kills, self.config = work, kills, config.resolve()
        self._seed = seed
        self._jobs: list[Job] = []
        self._finished: dict[tuple[Any, ...], Path] = {}
        self._locks: dict[tuple[Any, ...], threading.Lock] = {}
        self._own_lock = threading.Lock()
        self._text = work / "text"
        self._text.mkdir()
        for number, path in enumerate(sorted((ROOT / "optim_zoo").rglob("*.py"))):
            shutil.copy(path, self._text / f"{number:03}.txt")
        own = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        self._environment = {
            **own,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **environment,
        }

    def __enter__(self) -> "Site":
        return self

    def __exit__(self, *error: Any) -> None:
        for job in self._jobs:
            job.kill()

    def random(self, fault: str) -> random.Random:
        """Random numbers of a fault, the same whatever others are tried."""
        return random.Random(f"{self._seed} {fault}")

    def start(
        self,
        folder: Path,
        overrides: Iterable[str],
        spoilt: Spoilt | None = None,
        *,
        devices: int = 1,
    ) -> Job:
        """Starts the user's command on a run folder."""
        command = [sys.executable, "-m", "optim_zoo.cli"]
        if spoilt is not None:
            said = json.dumps(dataclasses.asdict(spoilt))
            command = [sys.executable, str(Path(__file__).resolve()), "--within", said]
        tokens = self.work / "tokens"
        if tokens.exists() and not folder.exists():
            shutil.copytree(tokens, folder / "tokens")
        flags = f"--xla_force_host_platform_device_count={devices}"
        own = [f"run.dir={folder}", f"data.text={self._text}/*.txt"]
        job = Job(
            [*command, "train", str(self.config), *own, *overrides],
            {**self._environment, "XLA_FLAGS": flags},
            self.work / f"job {uuid.uuid4()}",
        )
        self._jobs.append(job)
        return job

    def run(self, *arguments: Any, **options: Any) -> Ended:
        """`start`, to the end."""
        return self.start(*arguments, **options).end()

    def finished(
        self,
        overrides: tuple[str, ...] = SHORT,
        spoilt: Spoilt | None = None,
        *,
        devices: int = 1,
    ) -> Path:
        """The folder of a run to its end, made once; not to be changed.

        Raises:
          Failed: it does not get there.
        """
        key = (overrides, spoilt, devices)
        with self._own_lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._finished:
                folder = self.work / f"finished {uuid.uuid4()}"
                ended = self.run(folder, overrides, spoilt, devices=devices)
                if ended.code or ended.err:
                    raise Failed(
                        f"a run without the fault ended with exit {ended.code}: "
                        f"{sentence(ended.err, folder)}"
                    )
                with self._own_lock:
                    if not (self.work / "tokens").exists():
                        shutil.copytree(folder / "tokens", self.work / "tokens")
                self._finished[key] = folder
        return self._finished[key]

    def folder(self, fault: str) -> Path:
        """Where the run folder of a fault will be; its parent is there, and empty."""
        parent = self.work / f"fault {fault}"
        parent.mkdir()
        return parent / "run"


# What a run has left


def lines(folder: Path, *, rates: bool = False) -> list[Record]:
    """The whole lines of the metrics; without the rates, which a clock measures, unless asked."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    if not rates:
        for record in records:
            record.pop("tokens_per_second", None)
    return records


def trained(folder: Path) -> list[Record]:
    """The lines of the steps."""
    return [line for line in lines(folder) if line["kind"] == "train"]


def made(folder: Path) -> int:
    """The last step on record; 0 where there is none."""
    path = folder / "metrics.jsonl"
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for line in reversed(whole):
        record = json.loads(line)
        if record["kind"] == "train":
            return record["step"]
    return 0


def refused_steps(folder: Path) -> list[int]:
    """The steps after which more are counted as skipped than before."""
    counts = [(line["step"], line.get("skipped_steps", 0)) for line in trained(folder)]
    before = [0, *(count for _, count in counts)]
    return [step for (step, count), last in zip(counts, before, strict=False) if count > last]


def saved_steps(folder: Path) -> list[int]:
    """The steps whose checkpoint is whole; 0, where every run begins, is always among them."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return [0, *sorted(int(name) for name in names if name.isdecimal())]


def saving(folder: Path) -> bool:
    """Whether a save is going on, or was when the process died."""
    return any((folder / "checkpoints").glob("*tmp*"))


_ORBAX = threading.Lock()


def arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """What a checkpoint holds, by path; read without the library."""
    path = folder / "checkpoints" / str(step) / "training"
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint of step {step}")
    with _ORBAX, ocp.PyTreeCheckpointer() as reader:
        kinds = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), kinds)
        tree = reader.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(tree)
    }


def compared(folder: Path, other: Path, fewer: int | None = None) -> dict[str, bool]:
    """Whether metrics, parameters and optimizer state at the end are those of another run.

    Args:
      folder: the run folder.
      other: the run folder to compare with.
      fewer: of a run without some of the batches: how many steps fewer it makes to get to the same
        end. What counts steps is left out then, and so are held-out losses, lines of steps that
        were refused, and losses that are not there.
    """
    ours, theirs = lines(folder), lines(other)
    uncounted: set[str] = set()
    if fewer is not None:
        uncounted = {"refusals", "skipped"}
        refused = refused_steps(folder)
        ours = [line for line in trained(folder) if line["step"] not in refused]
        theirs = trained(other)[: len(ours)]
        for line, like in zip(ours, theirs, strict=False):
            left_out = ["step", "tokens", "skipped_steps", "skipped_micro_batches"]
            for name in left_out + ["loss"] * (line["loss"] is None):
                line.pop(name, None)
                like.pop(name, None)
    end = saved_steps(folder)[-1]
    here, there = arrays(folder, end), arrays(other, end - (fewer or 0))
    different = [
        path
        for path in here.keys() | there.keys()
        if _bits(here.get(path)) != _bits(there.get(path)) and not uncounted & {*path.split("/")}
    ]
    return {
        "metrics": ours == theirs,
        "parameters": not any(path.startswith("params/") for path in different),
        "optimizer state": not any(path.startswith("state/") for path in different),
    }


def _bits(x: np.ndarray | None) -> Any:
    return None if x is None else (x.dtype, x.shape, x.tobytes())


def _finite(folder: Path) -> bool:
    """Whether all parameters of the last checkpoint are."""
    last = arrays(folder, saved_steps(folder)[-1])
    parameters = [x for path, x in last.items() if path.startswith("params/")]
    return bool(parameters) and all(np.isfinite(x).all() for x in parameters)


# Parts of records


def sentence(err: str, folder: Path) -> str:
    """What is said on standard error; of anything but one sentence its end, and that it is none."""
    told = re.fullmatch(r"optim-zoo: (.+)\n", err)
    text = told[1] if told else f"no sentence: {err.strip()[-200:]!r}"
    return text.replace(str(folder), "run") if err else ""


def stopped(ended: Ended, folder: Path) -> Record:
    """How a run ended, and what it leaves."""
    return {
        "exit_code": ended.code,
        "said": sentence(ended.err, folder),
        "made": made(folder),
        "saved": saved_steps(folder)[-1],
    }


def going_on(ended: Ended, folder: Path) -> Record:
    """What the next start says, and where it begins."""
    notes, begun, rest = ended.out.partition("going on from the checkpoint of step ")
    return {
        "next_exit_code": ended.code,
        "next_said": sentence(ended.err, folder),
        "next_notes": notes.replace(str(folder), "run").splitlines() if begun else [],
        "resumed_from": int(rest.split()[0]) if begun else 0,
    }


def ends(folder: Path, other: Path, like: str, fewer: int | None = None) -> Record:
    """How a run folder compares in the end with another, which is called ``like``."""
    try:
        same = compared(folder, other, fewer)
        return {"like": like, "same": same, "finite": _finite(folder)}
    except (OSError, ValueError) as error:  # what is to be compared is not there
        return {"like": like, "same": {}, "finite": None, "not_compared": str(error)[:200]}


UNBROKEN = "an unbroken run"


def _mended(site: Site, folder: Path, ended: Ended) -> Record:
    """A run of `SHORT` that was broken, and the next start."""
    before = stopped(ended, folder)
    after = going_on(site.run(folder, SHORT), folder)
    lost = before["made"] - after["resumed_from"]
    return {**before, **after, "lost": lost, **ends(folder, site.finished(), UNBROKEN)}


# The faults


def kills(site: Site) -> Record:
    """Every second one during a save, every fourth before it is said where the run goes on."""
    expected, folder, chance = site.finished(LONG), site.folder("kills"), site.random("kills")
    seconds = _seconds_to_start(site)
    told: list[Record] = []
    for number in range(site.kills):
        job = site.start(folder, LONG)
        before = saved_steps(folder)[-1]
        if number % 4:
            reached = LONG_STEPS * number // (site.kills + 2) + chance.randrange(LONG_SAVE_EVERY)
            job.wait_for(job.goes_on)  # until then the last one's lines and half a save are there
            job.wait_for(lambda reached=reached: made(folder) >= reached)  # type: ignore[misc]
            if number % 2:
                job.wait_for(lambda: saving(folder))
            time.sleep(chance.uniform(0, 0.1))
        else:
            job.wait_for(job.goes_on, at_most=chance.uniform(0, 1) * seconds)
        job.kill()
        ended = job.end()
        if told:
            told[-1] |= going_on(ended, folder)
        going = job.goes_on()
        told.append(
            {
                "exit_code": ended.code,
                "during": "a start" if not going else "a save" if saving(folder) else "training",
                "made": max(made(folder), before) if going else before,
                "saved": saved_steps(folder)[-1],
            }
        )
    last = site.run(folder, LONG)
    told[-1] |= going_on(last, folder)
    # A start that was killed before it could say from where it goes on: the one after it says it.
    for kill, later in zip(told[-2::-1], told[:0:-1], strict=True):
        if later["during"] == "a start":
            kill["resumed_from"] = later["resumed_from"]
    landed = [kill for kill in told if kill["exit_code"] == -signal.SIGKILL]
    lost = [kill["made"] - kill["resumed_from"] for kill in landed]
    return {
        "kills": told,
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
        "next_said": sentence(last.err, folder),
        **ends(folder, expected, UNBROKEN),
    }


def _seconds_to_start(site: Site) -> float:
    """How long a start takes until it has made a step, on a machine as busy as it is now."""
    folder = site.folder("start")
    began = time.monotonic()
    job = site.start(folder, LONG)
    job.wait_for(lambda: made(folder) > 0)
    seconds = time.monotonic() - began
    job.kill()
    return seconds


def sigterm(site: Site) -> Record:
    """In the middle of the run."""
    site.finished()
    folder = site.folder("sigterm")
    job = site.start(folder, SHORT)
    job.wait_for(lambda: made(folder) > STRUCK)
    job.process.send_signal(signal.SIGTERM)
    return _mended(site, folder, job.end())


def full_disk(site: Site) -> Record:
    """With room for one checkpoint and a half."""
    expected, folder = site.finished(), site.folder("full_disk")
    checkpoint = _pages(expected / "checkpoints" / str(STEPS))
    size = _pages(expected / "tokens") + checkpoint * 3 // 2
    with _small_disk(folder.parent, size) as cannot:
        if cannot:
            return {"skipped": cannot}
        ended = site.run(folder, SHORT)
        resize = ["mount", "-o", f"remount,size={10 * size}", str(folder.parent)]
        subprocess.run(resize, check=True)
        return _mended(site, folder, ended)


def full_disk_between(site: Site) -> Record:
    """Filled up by somebody else after a save."""
    expected, folder = site.finished(), site.folder("full_disk_between")
    size = _pages(expected / "tokens") + 10 * _pages(expected / "checkpoints" / str(STEPS))
    with _small_disk(folder.parent, size) as cannot:
        if cannot:
            return {"skipped": cannot}
        job = site.start(folder, SHORT)
        job.wait_for(lambda: saved_steps(folder)[-1] > 0 and not saving(folder))
        filler = folder.parent / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(PAGE)):
                pass
        ended = job.end()
        filler.unlink()
        return _mended(site, folder, ended)


def _pages(folder: Path) -> int:
    """Bytes that the files of a folder take on a tmpfs."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(PAGE * math.ceil(size / PAGE) for size in sizes)


@contextlib.contextmanager
def _small_disk(path: Path, size: int) -> Iterator[str]:
    """A file system of so many bytes; gives why there is none, or nothing."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
        cannot = mounted.stderr.strip() if mounted.returncode else ""
    except OSError as error:
        cannot = str(error.strerror)
    if cannot:
        yield f"no file system may be mounted here: {cannot}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def truncated(site: Site) -> Record:
    """To half of its length."""
    return _damaged(site, "truncated", lambda content, _: content[: len(content) // 2])


def flipped_byte(site: Site) -> Record:
    """One, anywhere in the file."""

    def flipped(content: bytearray, chance: random.Random) -> bytearray:
        content[chance.randrange(len(content))] ^= 0xFF
        return content

    return _damaged(site, "flipped_byte", flipped)


def _damaged(
    site: Site, fault: str, damaged: Callable[[bytearray, random.Random], bytearray]
) -> Record:
    """A finished run, the largest file of whose last checkpoint is then damaged."""
    folder = shutil.copytree(site.finished(), site.folder(fault))
    files = [path for path in (folder / "checkpoints" / str(STEPS)).rglob("*") if path.is_file()]
    path = max(files, key=lambda path: (path.stat().st_size, path))
    path.write_bytes(damaged(bytearray(path.read_bytes()), site.random(fault)))
    before = {"made": made(folder), "saved": saved_steps(folder)[-2]}  # the last is whole no more
    after = going_on(site.run(folder, SHORT), folder)
    lost = before["made"] - after["resumed_from"]
    return {**before, **after, "lost": lost, **ends(folder, site.finished(), UNBROKEN)}


def two_jobs(site: Site) -> Record:
    """The second starts while the first trains."""
    expected, folder = site.finished(LONG), site.folder("two_jobs")
    first = site.start(folder, LONG)
    first.wait_for(lambda: made(folder) > 0)
    second = site.run(folder, LONG)
    at = made(folder)
    ended = first.end()
    return {
        "exit_code": second.code,
        "said": sentence(second.err, folder),
        "first_at": at,
        "first_exit_code": ended.code,
        "first_said": sentence(ended.err, folder),
        "lost": LONG_STEPS - made(folder),
        **ends(folder, expected, UNBROKEN),
    }


def nan_step(site: Site) -> Record:
    """The weights of its masked tokens are NaN, so that loss and gradient are."""
    return _refused(site, "nan_step", Spoilt("weights", (STRUCK, STRUCK + 1)))


def nan_micro_batch(site: Site) -> Record:
    """Compared with a run in which this micro-batch has no weight."""
    spoilt = Spoilt("weights", (2 * STRUCK, 2 * STRUCK + 1))
    overrides, folder = (*SHORT, "accumulation.every=2"), site.folder("nan_micro_batch")
    job = site.start(folder, overrides, spoilt)
    expected = site.finished(overrides, dataclasses.replace(spoilt, value=0.0))
    ended = job.end()
    left_out = [line["skipped_micro_batches"] for line in trained(folder)]
    like = "a run in which it has no weight"
    return {
        "left_out": left_out[-1] if left_out else 0,
        **_borne(site, folder, ended, spoilt, overrides, expected, like, fewer=0),
    }


def nan_one_device(site: Site, mode: str) -> Record:
    """The gradient alone: the loss of the device is finite."""
    size = config_file.load(site.config, SHORT).train.batch_size
    rows = (size - size // DEVICES, size)  # of the last device
    spoilt = Spoilt("gradient", (STRUCK, STRUCK + 1), rows)
    fault = f"nan_one_device {mode}"
    return _refused(site, fault, spoilt, (*SHORT, *MODES[mode]), devices=DEVICES)


INFINITE_LOSS = Spoilt("loss", (STRUCK, STRUCK + INFINITE), value=math.inf)


def infinite_loss(site: Site) -> Record:
    """The loss alone: its gradient is finite."""
    return _refused(site, "infinite_loss", INFINITE_LOSS)


def infinite_loss_ends(site: Site) -> Record:
    """More of them than are borne; then a larger limit."""
    folder = site.folder("infinite_loss_ends")
    job = site.start(folder, (*SHORT, f"guards.max_consecutive={BORNE}"), INFINITE_LOSS)
    expected = _without(site, INFINITE_LOSS, SHORT, devices=1)
    before = {**stopped(job.end(), folder), "refused": refused_steps(folder)}
    larger = (*SHORT, f"guards.max_consecutive={2 * INFINITE}", "run.accept_changes=true")
    after = going_on(site.run(folder, larger, INFINITE_LOSS), folder)
    return {
        **before,
        **after,
        "lost": before["made"] - after["resumed_from"],
        **ends(folder, expected, "a run without these batches", INFINITE),
    }


def clock(site: Site) -> Record:
    """A day back between two saves, and two days on right after a save was begun."""
    expected, folder, day = site.finished(), site.folder("clock"), 86400.0
    spoilt = Spoilt(clock=((STRUCK, -day), (2 * SAVE_EVERY, 2 * day)))
    ended = site.run(folder, SHORT, spoilt)
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
            if line.get("tokens_per_second") is not None  # as of the first step, which compiles
        ),
        **_borne(site, folder, ended, spoilt, SHORT, expected, UNBROKEN),
    }


def _refused(
    site: Site,
    fault: str,
    spoilt: Spoilt,
    overrides: tuple[str, ...] = SHORT,
    *,
    devices: int = 1,
) -> Record:
    """A run with spoilt batches beside one that is served none of them."""
    folder = site.folder(fault)
    job = site.start(folder, overrides, spoilt, devices=devices)
    expected = _without(site, spoilt, overrides, devices=devices)
    fewer = spoilt.batches[1] - spoilt.batches[0]
    like = "a run without " + ("this batch" if fewer == 1 else "these batches")
    ended = job.end()
    return _borne(site, folder, ended, spoilt, overrides, expected, like, fewer, devices)


def _borne(
    site: Site,
    folder: Path,
    ended: Ended,
    spoilt: Spoilt,
    overrides: tuple[str, ...],
    expected: Path,
    like: str,
    fewer: int | None = None,
    devices: int = 1,
) -> Record:
    """A run that should have got to its end, and the next start.

    Had it been killed before its last save, that is; where it has ended otherwise, that one goes on
    from there, and nothing is wrong with its batches.
    """
    record = stopped(ended, folder)
    if fewer is not None:
        record["refused"] = refused_steps(folder)
    if ended.code:
        after = going_on(site.run(folder, overrides, devices=devices), folder)
        record |= {**after, "lost": record["made"] - after["resumed_from"]}
    else:
        cut = shutil.copytree(folder, folder.with_name("cut"))
        shutil.rmtree(cut / "checkpoints" / str(record["saved"]))
        record |= {"saved": saved_steps(cut)[-1], "lost": len(record.get("refused", []))}
        record |= going_on(site.run(cut, overrides, spoilt, devices=devices), cut)
        record["next_same"] = ends(cut, folder, "")["same"]
    return {**record, **ends(folder, expected, like, fewer)}


def _without(site: Site, spoilt: Spoilt, overrides: tuple[str, ...], *, devices: int) -> Path:
    """A run like this but for the spoilt batches, with a save when it has made as many steps."""
    first, after = spoilt.batches
    served = dataclasses.replace(spoilt, batches=(0, 0), left_out=spoilt.batches)
    saved = f"output.checkpoint_every={STEPS - (after - first)}"
    return site.finished((*overrides, saved), served, devices=devices)


class Fault(NamedTuple):
    """What is done to a job."""

    title: str
    run: Callable[[Site], Record]
    variant: str = ""  # of the same


FAULTS: Mapping[str, Fault] = {
    "kills": Fault("`kill -9` at random moments", kills),
    "sigterm": Fault("SIGTERM", sigterm),
    "full_disk": Fault("the disk is full during a save", full_disk),
    "full_disk_between": Fault("the disk is filled up between two saves", full_disk_between),
    "truncated": Fault("a file of the last checkpoint is cut in half", truncated),
    "flipped_byte": Fault("a byte of the last checkpoint is flipped", flipped_byte),
    "two_jobs": Fault("a second job on the same run folder", two_jobs),
    "nan_micro_batch": Fault("NaN in one of the two micro-batches of a step", nan_micro_batch),
    **{
        f"nan_one_device_{name}": Fault(
            f"NaN in the gradient of one of {DEVICES} devices",
            functools.partial(nan_one_device, mode=mode),
            mode,
        )
        for name, mode in zip(("jit", "zero1", "shard_map", "pmap"), MODES, strict=True)
    },
    "nan_step": Fault("NaN in one batch", nan_step),
    "infinite_loss": Fault(f"an infinite loss for {INFINITE} steps", infinite_loss),
    "infinite_loss_ends": Fault(
        f"the same with `guards.max_consecutive={BORNE}`; the next start with {2 * INFINITE}",
        infinite_loss_ends,
    ),
    "clock": Fault("the clock jumps back by a day, then on by two during a save", clock),
}


def try_fault(site: Site, name: str) -> Record:
    """The record of one fault."""
    began = time.monotonic()
    fault = FAULTS[name]
    try:
        record = fault.run(site)
    except Failed as error:
        record = {"failed": str(error)}
    seconds = round(time.monotonic() - began, 1)
    named = {"fault": name, "title": fault.title, "variant": fault.variant}
    return {**named, **record, "seconds": seconds}


# The table


def table(records: Sequence[Record]) -> str:
    """Markdown; records that differ in nothing but their variant share a row.

    "Bit for bit" is said where metrics, parameters and optimizer state are all the same.
    """
    rows: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        row = record["title"], *cells(record)
        rows.setdefault(row, []).append(record["variant"])
    text = ["| fault | what happens | steps lost |", "|---|---|---|"]
    for (title, happens, lost), variants in rows.items():
        named = f" ({'; '.join(variants)})" if any(variants) else ""
        text.append(f"| {title}{named} | {happens} | {lost} |")
    return "\n".join(text)


def cells(record: Record) -> tuple[str, str]:
    """What happens, and how many steps are lost."""
    for why in ("skipped", "failed"):
        if why in record:
            return f"not known: {record[why]}", "?"
    lost = str(record["lost"])
    if "kills" in record:
        lost = (
            f"at most {record['lost']}, {record['lost_median']:g} in the median; a save is begun "
            f"every {record['save_every']}"
        )
    return "; ".join(_what_happens(record)).replace("|", "\\|"), lost


def _what_happens(record: Record) -> Iterator[str]:
    if "kills" in record:
        during = ", ".join(f"{count} during {when}" for when, count in record["during"].items())
        yield f"{record['landed']} of {len(record['kills'])} land, {during}"
        yield "every next start goes on from " + (
            "the last whole save" if record["from_the_last_whole"] else "another step than saved"
        )
    if "first_exit_code" in record:
        yield "the second: " + _exit(record["exit_code"], record["said"])
        first = _exit(record["first_exit_code"], record["first_said"])
        yield f"the first, at step {record['first_at']} by then: {first}"
    elif "exit_code" in record:
        yield _exit(record["exit_code"], record["said"])
    if "left_out" in record:
        yield f"micro-batches left out of a mean: {record['left_out']}"
    if "refused" in record:
        yield f"steps refused: {_ranges(record['refused'])}"
    if not record.get("rates_are_positive", True):
        yield "tokens per second are not positive"
    if "days_off" in record:
        yield f"the last saves are dated {_list([f'{days:+} d' for days in record['days_off']])}"
    if record.get("next_exit_code", 0) or record.get("next_said"):
        yield "the next start: " + _exit(record["next_exit_code"], record["next_said"])
    elif "resumed_from" in record and "next_same" not in record:
        notes = "".join(f' says "{note}" and' for note in record["next_notes"])
        yield f"the next start{notes} goes on from step {record['resumed_from']}"
    yield _alike(record["same"], record["like"])
    if not record["finite"]:
        yield "parameters are not finite" if record["finite"] is False else "no parameters"
    if "next_same" in record:
        yield f"gone on from step {record['resumed_from']}: " + _alike(
            record["next_same"], "before"
        )


def _exit(code: int, said: str) -> str:
    return f"exit {code}" + (f', "{said}"' if said else "")


def _alike(same: Mapping[str, bool], like: str) -> str:
    if not same:
        return f"nothing is left to compare with {like}"
    different = [name for name, is_same in same.items() if not is_same]
    if different:
        return f"{_list(different)} in the end not as {like}"
    return f"in the end bit for bit as {like}"


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _ranges(steps: Sequence[int]) -> str:
    if len(steps) > 1 and steps[-1] - steps[0] == len(steps) - 1:
        return f"{steps[0]} to {steps[-1]}"
    return ", ".join(map(str, steps)) or "none"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--within"]:
        return within(arguments[1], arguments[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--table", action="store_true", help="a Markdown table too")
    parser.add_argument("--kills", type=int, default=20, help="how often kill -9 (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills (0)")
    parser.add_argument("--jobs", type=int, default=2, help="faults tried at a time (2)")
    parser.add_argument("--config", type=Path, default=SMOKE, help="of the jobs (smoke.toml)")
    parsed = parser.parse_args(arguments)
    unknown = set(parsed.faults) - FAULTS.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(FAULTS)}")
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax, of what it can do without
    records = []
    with (
        tempfile.TemporaryDirectory() as work,
        Site(Path(work), parsed.config, kills=parsed.kills, seed=parsed.seed) as site,
        concurrent.futures.ThreadPoolExecutor(parsed.jobs) as pool,
    ):
        site.finished()  # which all have use for
        for record in pool.map(functools.partial(try_fault, site), parsed.faults or FAULTS):
            records.append(record)
            print(json.dumps(record), flush=True)
    if parsed.table:
        print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
