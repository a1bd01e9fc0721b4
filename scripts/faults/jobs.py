"""The jobs that faults happen to: the user's command in processes of their own, on the CPU."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import injection
from injection import Injection

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "configs" / "smoke.toml"

# The overrides of most jobs: `SMOKE` with fewer steps.
STEPS, SAVE_EVERY = 20, 5
SHORT = (
    f"train.steps={STEPS}",
    "train.batch_size=8",
    "output.log_every=1",
    "output.evaluation_batches=1",
    f"output.evaluate_every={STEPS}",
    f"output.checkpoint_every={SAVE_EVERY}",
)
MIDDLE = 7  # a batch of SHORT, from 0, that is not next to a save

# The overrides of jobs that are killed, or that another job meets. They take longer than a process
# takes to start, and their steps are so short that a save continues during many of them.
LONG_STEPS, LONG_SAVE_EVERY = 400, 20
LONG = (
    f"train.steps={LONG_STEPS}",
    "train.batch_size=8",
    "model.num_layers=1",
    "output.log_every=1",
    "output.evaluation_batches=1",
    "output.evaluate_every=150",
    f"output.checkpoint_every={LONG_SAVE_EVERY}",
)
TIMEOUT = 600.0  # seconds after which a job counts as stuck


class Failed(Exception):
    """A job that a fault is compared with did not do what it must."""


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str

    def sentence(self, folder: Path) -> str:
        """Returns the one sentence on standard error, in which ``folder`` is called "run".

        Anything else on standard error is returned as "no sentence" with its last characters.
        """
        if not self.err:
            return ""
        one = re.fullmatch(r"optim-zoo: (.+)\n", self.err)
        text = one[1] if one else f"no sentence: {self.err.strip()[-200:]!r}"
        return text.replace(str(folder), "run")


class Job:
    """A process that trains.

    Args:
      command: the command line.
      environment: all environment variables of the process.
      output: the path, without a suffix, of the files that receive standard output and standard
        error. Pipes would block the process once they are full.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], output: Path
    ) -> None:
        self._out, self._err = output.with_suffix(".out"), output.with_suffix(".err")
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)

    def has_begun(self) -> bool:
        """Returns whether it has made a step, or printed the step that it resumes from."""
        return "step " in self._out.read_text()

    def wait_for(self, condition: Callable[[], bool], *, at_most: float = math.inf) -> None:
        """Waits until the condition holds, the process ends, or ``at_most`` seconds have passed.

        Raises:
          Failed: none of these happened in `TIMEOUT` seconds.
        """
        began = time.monotonic()
        while not condition() and self.process.poll() is None:
            waited = time.monotonic() - began
            if waited > at_most:
                return
            if waited > TIMEOUT:
                raise Failed(f"the job did not reach the expected state in {TIMEOUT:g} s")
            time.sleep(0.005)

    def end(self) -> Ended:
        """Waits for the end of the process.

        Raises:
          Failed: it did not end in `TIMEOUT` seconds; it is killed.
        """
        try:
            self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Failed(f"the job did not end in {TIMEOUT:g} s") from None
        finally:
            self.kill()
        return Ended(self.process.returncode, self._out.read_text(), self._err.read_text())

    def kill(self) -> None:
        """Kills the process with SIGKILL and waits for its end."""
        self.process.kill()
        self.process.wait()


class Site:
    """A folder with jobs that run in it. As a context manager, it kills them on exit.

    Args:
      work: the folder, which must be empty.
      config: the config file of all jobs.
      kills: how often the fault ``kills`` kills its job.
      seed: seeds the random numbers of all faults.
      environment: further environment variables of the jobs.
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
        # The text that the jobs train on is the source of this package.
        self._text = work / "text"
        self._text.mkdir()
        for number, path in enumerate(sorted((ROOT / "optim_zoo").rglob("*.py"))):
            shutil.copy(path, self._text / f"{number:03}.txt")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        self._environment = {
            **inherited,
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
        """The random numbers of a fault, which do not depend on the other faults that are tried."""
        return random.Random(f"{self._seed} {fault}")

    def start(
        self,
        folder: Path,
        overrides: Iterable[str],
        faulty: Injection | None = None,
        *,
        devices: int = 1,
    ) -> Job:
        """Starts the user's command.

        Args:
          folder: the run folder.
          overrides: of the config.
          faulty: the faults to inject; None runs the command itself.
          devices: the number of virtual devices.
        """
        command = [sys.executable, "-m", "optim_zoo.cli"]
        if faulty is not None:
            program = str(Path(injection.__file__).resolve())
            command = [sys.executable, program, json.dumps(dataclasses.asdict(faulty))]
        tokens = self.work / "tokens"
        if tokens.exists() and not folder.exists():
            shutil.copytree(tokens, folder / "tokens")  # so that the text is not tokenized again
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
        """Starts the user's command as `start` does, and waits for its end."""
        return self.start(*arguments, **options).end()

    def finished(
        self,
        overrides: tuple[str, ...] = SHORT,
        faulty: Injection | None = None,
        *,
        devices: int = 1,
    ) -> Path:
        """The folder of a run that reached its end. It is made once and must not be changed.

        Raises:
          Failed: the run ended with an error.
        """
        key = (overrides, faulty, devices)
        with self._own_lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._finished:
                folder = self.work / f"finished {uuid.uuid4()}"
                ended = self.run(folder, overrides, faulty, devices=devices)
                if ended.code or ended.err:
                    raise Failed(
                        f"a run without the fault ended with exit {ended.code}: "
                        f"{ended.sentence(folder)}"
                    )
                with self._own_lock:
                    if not (self.work / "tokens").exists():
                        shutil.copytree(folder / "tokens", self.work / "tokens")
                self._finished[key] = folder
        return self._finished[key]

    def folder(self, fault: str) -> Path:
        """The path of a run folder for a fault. It does not exist yet; its parent is empty."""
        parent = self.work / f"fault {fault}"
        parent.mkdir()
        return parent / "run"
