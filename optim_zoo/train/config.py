"""The config of a run: the default, the meaning and the range of every value.

A TOML file and ``section.key=value`` on the command line override these defaults. The sections
``[optimizer]`` and ``[schedule]`` hold the name of a constructor and its arguments, whose defaults
are those of the constructor. A task adds sections of its own (`optim_zoo.train.tasks.base.Task`).
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from optim_zoo import ranges
from optim_zoo.errors import ArgumentValueError

MOST = 2**31 - 1  # the largest whole number of a config: JAX counts in 32 bits
MOST_SEED = 2**32 - 1  # jax.random.key ignores higher bits
MOST_IN_SIZE = 2**20  # the largest size of a model: two such axes fit in an array of XLA


def check_size(name: str, value: int, low: int = 1) -> None:
    """Raises unless ``value`` is a size that an axis of an array in a model may have.

    XLA aborts the process if the number of elements of an array does not fit in 64 bits.

    Raises:
      ArgumentTypeError: ``value`` is not a whole number.
      ArgumentValueError: it is below ``low``, or above 1,048,576.
    """
    ranges.check_count(name, value, low)
    if value > MOST_IN_SIZE:
        raise ArgumentValueError(name, f"be at most {MOST_IN_SIZE}", value)


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a run is written, and its seed."""

    dir: str = ""  # the run folder; "" means runs/<name of the config file>
    seed: int = 0  # the seed of the parameters, batches and dropout
    accept_changes: bool = False  # resume although the config or the data has changed

    def __post_init__(self) -> None:
        ranges.check_count("seed", self.seed)
        if self.seed > MOST_SEED:
            raise ArgumentValueError("seed", f"be at most {MOST_SEED}", self.seed)


@dataclasses.dataclass(frozen=True)
class TaskChoice:
    """The task: what is trained, on which data."""

    # A name in optim_zoo.train.tasks.TASKS, or an import path such as "my_package.task:MyTask".
    name: str = "masked_language"


@dataclasses.dataclass(frozen=True)
class Train:
    """The length of the run and the size of its batches."""

    steps: int = 1000
    batch_size: int = 256  # examples per batch, over all devices
    micro_batches: int = 1  # parts of a batch, computed one after another to save memory
    clip_norm: float = 1.0  # gradients are clipped to this global norm; inf disables clipping
    noise_scale: bool = False  # measure the gradient noise scale, the estimated critical batch size

    def __post_init__(self) -> None:
        ranges.check_count("steps", self.steps, 1)
        check_size("batch_size", self.batch_size)
        check_size("micro_batches", self.micro_batches)
        ranges.check("clip_norm", self.clip_norm, 0.0, open_low=True)


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """Gradient accumulation: steps over several batches, each computed in a call of its own."""

    every: int = 1  # the number of batches per step

    def __post_init__(self) -> None:
        ranges.check_count("every", self.every, 1)


@dataclasses.dataclass(frozen=True)
class Precision:
    """Storage precision of the parameters and of the optimizer state."""

    parameters: str = "float32"  # or "bfloat16"
    wrapper: str = "master_weights"  # for bfloat16 parameters; or "stochastic_rounding", "none"
    # Fields of the optimizer state -> "bfloat16" or "float16", such as {nu = "bfloat16"}.
    state: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        ranges.check_choice("parameters", self.parameters, ("float32", "bfloat16"))
        wrappers = ("master_weights", "stochastic_rounding", "none")
        ranges.check_choice("wrapper", self.wrapper, wrappers)
        if not set(self.state.values()) <= {"bfloat16", "float16"}:
            expected = 'be fields with "bfloat16" or "float16", such as {mu = "bfloat16"}'
            raise ArgumentValueError("state", expected, self.state)


@dataclasses.dataclass(frozen=True)
class Averaging:
    """An exponential moving average of the parameters: averaging.average_parameters, debiased."""

    decay: float = 0.0  # its decay rate per step, such as 0.999; 0 keeps no average
    evaluate: bool = True  # evaluate the average instead of the parameters, also for keep_best

    def __post_init__(self) -> None:
        ranges.check("decay", self.decay, 0.0, 1.0, open_high=True)


@dataclasses.dataclass(frozen=True)
class Guards:
    """Which steps are skipped. A skipped step changes neither parameters nor optimizer state."""

    nonfinite: bool = True  # skip steps whose loss or gradient is not finite
    spikes: bool = False  # also skip steps whose loss or gradient norm spikes
    window: int = 50  # the number of past steps that a spike is measured against
    factor: float = 4.0  # a spike is more than this many times their median
    max_consecutive: int = 20  # this many skipped steps in a row end the run

    def __post_init__(self) -> None:
        check_size("window", self.window, 2)
        ranges.check("factor", self.factor, 1.0, open_low=True, open_high=True)
        ranges.check_count("max_consecutive", self.max_consecutive, 1)
        if self.spikes and not self.nonfinite:
            advice = "remove nonfinite"
            raise ArgumentValueError(
                "spikes",
                "be false where nonfinite is false",
                self.spikes,
                advice,
                sentence="{argument}=true also skips steps that are not finite, got it with "
                f"nonfinite=false: {advice}",
                related=["nonfinite"],
            )


@dataclasses.dataclass(frozen=True)
class Output:
    """What a run writes, and how often."""

    log_every: int = 10  # steps between two lines of metrics.jsonl
    evaluate_every: int = 200  # steps between two evaluations
    evaluation_batches: int = 8  # at most, in batches of the first stage's size
    checkpoint_every: int = 200  # steps between two checkpoints
    keep_checkpoints: int = 3  # how many of the last checkpoints are kept
    # The held-out metric whose best parameters are kept in the folder best, such as "f1"; "" keeps
    # none. Lower is better if the name ends in loss, error or perplexity, or with "-" before it;
    # higher otherwise, or with "+" before it.
    keep_best: str = ""
    stop_after: int = 0  # evaluations in a row without a better keep_best that end the run; 0: none
    # Names in optim_zoo.train.sinks.SINKS, or import paths. metrics.jsonl is always written.
    sinks: tuple[str, ...] = ("progress", "plots", "report")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in ("sinks", "keep_best", "stop_after"):
                ranges.check_count(field.name, getattr(self, field.name), 1)
        ranges.check_count("stop_after", self.stop_after)
        if self.stop_after and not self.keep_best:
            raise ArgumentValueError(
                "stop_after",
                "be 0 where keep_best is not set",
                self.stop_after,
                'set keep_best to a held-out metric, such as "loss"',
                related=["keep_best"],
            )


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How the step runs on several devices."""

    mode: str = "jit"  # or "shard_map", "pmap": see optim_zoo.sharding.data_parallel
    zero1: bool = False  # shard the optimizer state over the devices (ZeRO-1); in mode "jit" only

    def __post_init__(self) -> None:
        ranges.check_choice("mode", self.mode, ("jit", "shard_map", "pmap"))
        if self.zero1 and self.mode != "jit":
            raise ArgumentValueError(
                "zero1",
                "be false unless mode is 'jit'",
                self.zero1,
                sentence=f"{{argument}} belongs to mode 'jit', got it with mode {self.mode!r}",
                related=["mode"],
            )


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Launch settings. They are not part of the experiment's identity.

    With the defaults, JAX detects the cluster (Slurm, Open MPI, GKE, a TPU pod); without a cluster
    the run has one process.
    """

    coordinator: str = ""  # "host:port" of process 0, which all others can reach
    processes: int = 0  # the number of processes; 1 means this one alone, also on a cluster
    index: int = -1  # the index of this process, from 0
    heartbeat_seconds: int = 10  # a process without a heartbeat for this long is lost
    start_seconds: int = 300  # how long the processes wait for each other at the start

    def __post_init__(self) -> None:
        ranges.check_count("processes", self.processes)
        ranges.check_count("index", self.index, -1)
        ranges.check_count("heartbeat_seconds", self.heartbeat_seconds, 2)
        ranges.check_count("start_seconds", self.start_seconds, 1)
        _, colon, port = self.coordinator.rpartition(":")
        if self.coordinator and not (colon and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise ArgumentValueError("coordinator", "be host:port", self.coordinator)
        unset = {"coordinator": "", "processes": 0, "index": -1}
        missing = [name for name, value in unset.items() if getattr(self, name) == value]
        if 0 < len(missing) < 3 and not (self.processes == 1 and len(missing) == 2):
            given = {name: getattr(self, name) for name in unset if name not in missing}
            advice = f"{' and '.join(missing)} must be set too"
            raise ArgumentValueError(
                next(iter(given)),
                f"be set together with {' and '.join(missing)}",
                given,
                advice,
                sentence=f"coordinator, processes and index belong together: {advice}",
                related=[*given, *missing],
            )
        if self.index >= self.processes > 0:
            advice = "it counts from 0"
            raise ArgumentValueError(
                "index",
                "be below processes",
                self.index,
                advice,
                sentence=f"{{argument}} must be below processes, got {self.index} of "
                f"{self.processes}: {advice}",
                related=["processes"],
            )


@dataclasses.dataclass(frozen=True)
class Choice:
    """The name of a constructor, and all of its arguments that a config may set."""

    name: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run whose batches have the same shapes, with a schedule of its own.

    A ``[[stages]]`` table sets what differs in its stage; everything else is taken from
    ``[train]``, ``[schedule]`` and the task's sections. A config without such tables has one stage.
    """

    steps: int
    batch_size: int
    micro_batches: int
    schedule: Mapping[str, Any]  # the arguments of the schedule, which starts anew with each stage
    sections: Mapping[str, Any]  # the task's sections, with the values of this stage
    table: Mapping[str, Any]  # what the [[stages]] table sets
    settings: Mapping[str, Any]  # every key that the table could set, with the value in use


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that describes a run. The fields are the sections of the file, in this order."""

    run: Run
    task: TaskChoice
    task_sections: Mapping[str, Any]  # the sections that belong to the task, by name
    optimizer: Choice
    schedule: Choice
    train: Train
    stages: tuple[Stage, ...]
    precision: Precision
    accumulation: Accumulation
    averaging: Averaging
    guards: Guards
    output: Output
    parallel: Parallel
    distributed: Distributed

    @property
    def total_steps(self) -> int:
        """The number of steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_of(self, step: int) -> int:
        """Returns the index of the stage that step number ``step`` (from 0) belongs to."""
        ends = itertools.accumulate(stage.steps for stage in self.stages)
        within = (index for index, end in enumerate(ends) if step < end)
        return next(within, len(self.stages) - 1)

    def batches_after(self, steps: int) -> list[int]:
        """Returns the number of batches that each stage has used after ``steps`` steps."""
        used = []
        for stage in self.stages:
            used.append(min(steps, stage.steps) * self.accumulation.every)
            steps -= min(steps, stage.steps)
        return used
