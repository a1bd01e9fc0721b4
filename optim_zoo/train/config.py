"""The configuration of a run: every value once, with its default, its meaning and its range.

A TOML file and ``section.key=value`` on the command line only override what stands here. The
sections ``[optimizer]`` and ``[schedule]`` hold a registry name and the arguments of that
constructor, whose own defaults count.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from optim_zoo import ranges
from optim_zoo.errors import ArgumentValueError, UserError

TASK_NAMES = ("bert_mlm",)  # those of optim_zoo.train.tasks, which builds on this file


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a run lives."""

    dir: str = ""  # the run folder; "": runs/<name of the config file>
    seed: int = 0  # of parameters, batches and dropout
    accept_changes: bool = False  # go on in a folder whose config or text has changed since

    def __post_init__(self) -> None:
        ranges.check_count("seed", self.seed)
        if self.seed >= 1 << 32:  # jax.random.key looks at no more bits
            raise ArgumentValueError("seed", "be below 2**32", self.seed)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned."""

    name: str = "bert_mlm"  # a name in optim_zoo.train.tasks

    def __post_init__(self) -> None:
        ranges.check_choice("name", self.name, TASK_NAMES)


@dataclasses.dataclass(frozen=True)
class Data:
    """The text."""

    text: str = ""  # a glob of UTF-8 files; "": docstrings and help of the standard library
    vocabulary: str = ""  # a WordPiece vocabulary, one token a line; "": the one that comes along
    held_out: float = 0.05  # the share of the tokens that is never trained on
    sequence_length: int = 128  # tokens, with [CLS] and [SEP]

    def __post_init__(self) -> None:
        ranges.check("held_out", self.held_out, 0.0, 1.0, open_low=True, open_high=True)
        ranges.check_count("sequence_length", self.sequence_length, 8)


@dataclasses.dataclass(frozen=True)
class Model:
    """BERT's sizes; the defaults are BERT-tiny's (arXiv 1908.08962)."""

    num_layers: int = 2
    hidden_size: int = 128
    num_heads: int = 2
    intermediate_size: int = 512
    max_positions: int = 512
    dropout: float = 0.0  # of hidden states and attention; BERT uses 0.1
    scan_layers: bool = True  # stack the encoder's layers in one array each: compiles faster
    dtype: str = "float32"  # of the arithmetic, float32 or bfloat16; parameters are float32

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "intermediate_size"):
            ranges.check_count(name, getattr(self, name), 1)
        ranges.check_count("max_positions", self.max_positions, 8)
        ranges.check("dropout", self.dropout, 0.0, 1.0, open_high=True)
        ranges.check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if self.hidden_size % self.num_heads:
            sizes = f"{self.hidden_size} and {self.num_heads}"
            raise ArgumentValueError(
                "hidden_size",
                "divide by num_heads",
                self.hidden_size,
                sentence=f"{{argument}} must divide by num_heads, got {sizes}",
                related=["num_heads"],
            )


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, and on how much at once."""

    steps: int = 1000
    batch_size: int = 256  # sequences, over all devices
    micro_batches: int = 1  # parts of a batch worked through one after another, to save memory
    clip_norm: float = 1.0  # the global norm gradients are clipped to; inf: never

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batches"):
            ranges.check_count(name, getattr(self, name), 1)
        ranges.check("clip_norm", self.clip_norm, 0.0, open_low=True)


@dataclasses.dataclass(frozen=True)
class SecondStage:
    """A second stage with another batch and sequence length, as BERT is trained; steps = 0: none.

    The schedule starts again with it, from zero over ``warmup_steps`` (mixed-batch training,
    arXiv 1904.00962).
    """

    steps: int = 0
    batch_size: int = 256
    micro_batches: int = 1
    sequence_length: int = 512
    learning_rate: float = 0.0  # must be set where there are steps
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        ranges.check_count("steps", self.steps)
        for name in ("batch_size", "micro_batches"):
            ranges.check_count(name, getattr(self, name), 1)
        ranges.check_count("sequence_length", self.sequence_length, 8)
        there = self.steps > 0
        ranges.check("learning_rate", self.learning_rate, 0.0, open_low=there, open_high=True)
        ranges.check_count("warmup_steps", self.warmup_steps)


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """Steps made of several batches, one after another, each in a call of its own."""

    every: int = 1  # batches of train.batch_size that a step takes

    def __post_init__(self) -> None:
        ranges.check_count("every", self.every, 1)


@dataclasses.dataclass(frozen=True)
class Precision:
    """In how many bits parameters and the optimizer's state are kept."""

    parameters: str = "float32"  # or "bfloat16"
    wrapper: str = "master_weights"  # of bfloat16 ones; or "stochastic_rounding", "none"
    # Fields of the optimizer's state -> "bfloat16" or "float16", such as {nu = "bfloat16"}.
    state: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        ranges.check_choice("parameters", self.parameters, ("float32", "bfloat16"))
        wrappers = ("master_weights", "stochastic_rounding", "none")
        ranges.check_choice("wrapper", self.wrapper, wrappers)
        if not set(self.state.values()) <= {"bfloat16", "float16"}:
            expected = 'be fields with "bfloat16" or "float16", such as {mu = "bfloat16"}'
            raise ArgumentValueError("state", expected, self.state)


@dataclasses.dataclass(frozen=True)
class Guards:
    """Which steps are refused: parameters and state are as if there had been no such batch."""

    nonfinite: bool = True  # those with a loss or gradient that is not finite
    spikes: bool = False  # those whose loss or gradient norm jumps up too
    window: int = 50  # steps a jump is measured by
    factor: float = 4.0  # times their median is a jump
    max_consecutive: int = 20  # so many in a row end the run

    def __post_init__(self) -> None:
        ranges.check_count("window", self.window, 2)
        ranges.check("factor", self.factor, 1.0, open_low=True, open_high=True)
        ranges.check_count("max_consecutive", self.max_consecutive, 1)
        if self.spikes and not self.nonfinite:
            advice = "leave nonfinite out"
            raise ArgumentValueError(
                "spikes",
                "be false where nonfinite is false",
                self.spikes,
                advice,
                sentence="{argument}=true refuses what is not finite too, got it with "
                f"nonfinite=false: {advice}",
                related=["nonfinite"],
            )


@dataclasses.dataclass(frozen=True)
class Output:
    """How often what is written; in steps."""

    log_every: int = 10  # a line of metrics.jsonl
    evaluate_every: int = 200  # held-out loss, plots and report
    evaluation_batches: int = 8  # of train.batch_size sequences, or fewer where the text ends
    checkpoint_every: int = 200
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            ranges.check_count(field.name, getattr(self, field.name), 1)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How the step is spread over devices."""

    mode: str = "jit"  # or "shard_map", "pmap": see optim_zoo.sharding.data_parallel
    zero1: bool = False  # spread the optimizer's state over the devices too; in mode "jit"

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
    """The processes of a run; it says where a run is started, and is no part of what it is.

    All defaults: those of the cluster where JAX finds one (Slurm, Open MPI, GKE, a TPU pod), else
    this process alone.
    """

    coordinator: str = ""  # "host:port" of the process of index 0, which all others reach
    processes: int = 0  # how many; 1: this one alone, whatever the cluster says
    index: int = -1  # of this process, from 0 on
    heartbeat_seconds: int = 10  # a process that is not heard of for so long is lost
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
    """A constructor by name, and all of its arguments that a config may set."""

    name: str
    arguments: Mapping[str, Any]


class Stage(NamedTuple):
    """A stretch of steps with the same shapes."""

    steps: int
    batch_size: int
    micro_batches: int
    sequence_length: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run is made from; a field is a section of the file."""

    run: Run
    task: Task
    data: Data
    model: Model
    optimizer: Choice
    schedule: Choice
    train: Train
    second_stage: SecondStage
    precision: Precision
    accumulation: Accumulation
    guards: Guards
    output: Output
    parallel: Parallel
    distributed: Distributed

    def __post_init__(self) -> None:
        longest = max(stage.sequence_length for stage in self.stages)
        if longest > self.model.max_positions:
            raise UserError(
                f"model.max_positions must be at least the sequence length {longest}, "
                f"got {self.model.max_positions}: raise it, or shorten the sequences"
            )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, one after another."""
        first = Stage(
            self.train.steps,
            self.train.batch_size,
            self.train.micro_batches,
            self.data.sequence_length,
        )
        second = self.second_stage
        if second.steps == 0:
            return (first,)
        shapes = (second.batch_size, second.micro_batches, second.sequence_length)
        return first, Stage(second.steps, *shapes)

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_of(self, step: int) -> int:
        """The index of the stage that step number ``step`` (from 0) belongs to."""
        return int(step >= self.train.steps and len(self.stages) > 1)

    def tokens_after(self, steps: int) -> int:
        """Tokens seen after ``steps`` steps, padding and special tokens included."""
        every = self.accumulation.every
        seen = 0
        for stage in self.stages:
            here = min(steps, stage.steps)
            seen += here * every * stage.batch_size * stage.sequence_length
            steps -= here
        return seen
