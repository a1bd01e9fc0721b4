"""The interface of a task: what the training loop needs to know of what is learned.

A task is a class with a few methods. `optim_zoo.train.tasks.digits` is the shortest complete one;
``docs/your_own_task.md`` shows how to write another and name it in a config.
"""

import abc
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import numpy as np

from optim_zoo import rules
from optim_zoo.sharding import WeightedLoss
from optim_zoo.train.config import Stage
from optim_zoo.tree import Tree

Batch = dict[str, np.ndarray]
"""Arrays by name. The first axis of each array is the batch: one example per row."""

WeightedSum = tuple[jax.Array, jax.Array]
"""``(sum, weight)``, two scalars: a sum over a batch, and the weight that turns it into a mean."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a task is made from."""

    sections: Mapping[str, Any]  # the task's config sections, as instances of their dataclasses
    stages: Sequence[Stage]  # the stages of the run; the first one may be the only one
    seed: int  # run.seed
    evaluation_batches: int  # output.evaluation_batches, in batches of the first stage
    cache: Path  # a folder for files that are made once, such as encoded text


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A trivial predictor to compare a run with, measured on the same held-out data."""

    name: str  # how it predicts, after "loss by": "token frequency"
    metrics: Mapping[str, float]  # metric -> the value that it reaches


class Task(abc.ABC):
    """A task: parameters, a loss, batches and held-out metrics.

    A subclass sets the class attributes that it needs and implements the abstract methods. It is
    made once at the start of a run, in every process of it; whatever it returns must be the same in
    all of them.
    """

    sections: ClassVar[Mapping[str, type]] = MappingProxyType({})
    """The task's own sections of the config: name -> dataclass. Each field has a default, and is an
    int, float, str, bool, ``dict[str, str]`` or ``tuple[str, ...]``."""

    stage_keys: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Keys that a ``[[stages]]`` table may override: key -> the section that it belongs to."""

    unit: ClassVar[str] = "examples"
    """What `units` counts, in the plural. The metrics have ``<unit>`` and ``<unit>_per_second``."""

    loss_unit: ClassVar[str] = ""
    """The unit of the loss, such as ``nats``."""

    layers: rules.Rules = ()
    """What a layer is in the parameters, passed to an optimizer that takes ``layers``."""

    identity: Mapping[str, str] = MappingProxyType({})
    """Digests of the data by name. A checkpoint of other data is refused."""

    essential: Collection[str] = ()
    """Names in ``identity`` that give the parameters their meaning, as a vocabulary does: these are
    refused even with ``run.accept_changes=true``."""

    baseline: Baseline | None = None
    """A trivial predictor, drawn and reported next to the run."""

    def __init__(self, setup: Setup) -> None:
        """Prepares the task, before anything is compiled.

        Raises:
          UserError: the data cannot be used.
        """
        self.setup = setup

    @classmethod
    def check(cls, setup: Setup) -> None:
        """Checks values of the config that are wrong only together, before any data is read.

        Raises:
          UserError: they do not fit.
        """
        del setup

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Tree:
        """Returns the initial parameters; traced by ``jax.jit``."""

    @abc.abstractmethod
    def loss(self, params: Tree, batch: Tree) -> WeightedLoss:
        """Returns the training loss summed over a batch, and its weight; traced by ``jax.jit``.

        A plain pair ``(total, weight)`` is accepted too.
        """

    @abc.abstractmethod
    def batch(self, number: int, stage: Stage) -> Batch:
        """Returns training batch ``number`` (from 0) of ``stage.batch_size`` examples.

        It must be a pure function of its arguments: this is what lets a run resume bit for bit.
        """

    @abc.abstractmethod
    def held_out(self) -> Sequence[Batch]:
        """Returns the batches of every evaluation, always the same."""

    def measure(self, params: Tree, batch: Tree) -> Mapping[str, WeightedSum]:
        """Returns the held-out metrics of a batch as ``(sum, weight)``; traced by ``jax.jit``.

        The metric is the total sum over the total weight of all batches. ``loss`` must be among
        them. The default is the training loss alone.
        """
        return {"loss": self.loss(params, batch)}

    def units(self, stage: Stage) -> int:
        """Returns how many units (see ``unit``) a batch of this stage has."""
        return stage.batch_size
