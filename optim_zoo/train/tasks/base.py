"""The interface of a task: what the training loop needs to know about what is trained.

A task is a class with a few methods. `optim_zoo.train.tasks.digits` is the shortest complete one;
``docs/your_own_task.md`` shows how to write another and name it in a config.
"""

import abc
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import numpy as np

from optim_zoo import rules
from optim_zoo.errors import UserError
from optim_zoo.sharding import WeightedLoss
from optim_zoo.train.config import Stage
from optim_zoo.tree import Tree

Batch = dict[str, np.ndarray]
"""Arrays by name. The first axis of each array is the batch: one example per row."""

WeightedSum = tuple[jax.Array, jax.Array]
"""``(sum, weight)``, two scalars: a sum over a batch, and the weight by which to divide it."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """The arguments of a task."""

    sections: Mapping[str, Any]  # the task's config sections, as instances of their dataclasses
    stages: Sequence[Stage]  # the stages of the run; the first one may be the only one
    seed: int  # run.seed
    evaluation_batches: int  # output.evaluation_batches, in batches of the first stage
    cache: Path  # a folder for files that are made once, such as tokens
    # Whether the task trains or evaluates. Without data it reads only what its parameters need,
    # such as a vocabulary; `batch` and `held_out` are not called, and `identity` may lack what is
    # not `essential`.
    reads_data: bool = True


@dataclasses.dataclass(frozen=True)
class Baseline:
    """The held-out metrics of a trivial predictor, to compare a run with."""

    name: str  # how it predicts, such as "token frequency"; shown after "loss by"
    metrics: Mapping[str, float]  # metric -> the value that it reaches


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model, ready to be used: what `optim_zoo.train.load` returns.

    A task whose model can be called returns a subclass with methods for it, such as
    `optim_zoo.train.tasks.bert.loaded.LoadedBert`.
    """

    task: "Task"  # made without training data, see `Setup.reads_data`
    model: Any  # the task's attribute ``model``, such as a Flax module; None if it has none
    params: Tree  # plain arrays on one device, in the dtypes of the run
    tokenizer: Any  # turns text into ids; None for a task without text
    step: int  # the number of steps after which the parameters were saved


class Task(abc.ABC):
    """A task: parameters, a loss, batches and held-out metrics.

    A subclass sets the class attributes that it needs and implements the abstract methods. Every
    process of a run makes one at the start; all of them must return the same values.
    """

    sections: ClassVar[Mapping[str, type]] = MappingProxyType({})
    """The task's own sections of the config: name -> dataclass. Each field has a default, and is an
    int, float, str, bool, ``dict[str, str]`` or ``tuple[str, ...]``."""

    stage_keys: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Keys that a ``[[stages]]`` table may override: key -> the section that it belongs to."""

    paths: ClassVar[Collection[str]] = ()
    """Keys of the task's sections that hold a path or a glob, such as ``data.text``. A run folder
    keeps them as absolute paths. A resumed run may have other ones: ``identity`` says whether the
    data is the same."""

    earlier_values: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Keys of the task's sections that were added later, such as ``model.activation``: key -> the
    value that runs used before. A saved config without the key has this value, and a config of the
    user without it has the default of the section."""

    unit: ClassVar[str] = "examples"
    """What `units` counts, in the plural. The metrics have ``<unit>`` and ``<unit>_per_second``."""

    loss_unit: ClassVar[str] = ""
    """The unit of the loss, such as ``nats``."""

    weight_unit: ClassVar[str] = ""
    """What the weights of the loss count, in the plural, such as ``masked tokens``. It is the unit
    of ``gradient_noise_scale`` in the metrics."""

    layers: rules.Rules = ()
    """Layer rules for the parameters, passed to an optimizer that has an argument ``layers``."""

    identity: Mapping[str, str] = MappingProxyType({})
    """Digests of the data by name. A checkpoint with other digests is refused."""

    essential: Collection[str] = ()
    """Names in ``identity`` of data that gives the parameters their meaning, such as a vocabulary.
    A change of these is refused even with ``run.accept_changes=true``."""

    facts: Mapping[str, str] = MappingProxyType({})
    """What to know about the data, name -> text: shown at the start and in the report."""

    notes: Sequence[str] = ()
    """Sentences to show at the start, such as warnings about the data."""

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
        """Checks values of the config that must fit together, before any data is read.

        Raises:
          UserError: they do not fit.
        """
        del setup

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Tree:
        """Returns the initial parameters; traced by ``jax.jit``."""

    def pretrained(self, params: Tree) -> Tree:
        """Returns the parameters to start from, given those of `init`.

        It is called once, outside of ``jax.jit``, where a run starts anew; a resumed run takes its
        parameters from a checkpoint. The default returns ``params`` unchanged. A task that starts
        from other parameters returns a tree of the same structure and shapes, whose arrays may be
        NumPy's and of any dtype. It finds what is missing in its constructor, and says so in
        ``notes``.
        """
        return params

    def loaded(self, params: Tree, step: int) -> Loaded:
        """Returns the record that `optim_zoo.train.load` gives to the user.

        Args:
          params: the parameters of a saved step, on one device.
          step: the number of steps after which they were saved.
        """
        return Loaded(self, getattr(self, "model", None), params, None, step)

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
        """Returns the batches of an evaluation, which are always the same."""

    def measure(self, params: Tree, batch: Tree) -> Mapping[str, WeightedSum]:
        """Returns the held-out metrics of a batch as ``(sum, weight)``; traced by ``jax.jit``.

        The metric is the total sum over the total weight of all batches; where that weight is 0, a
        metric other than the loss is 0. ``loss`` must be among them. The default is the training
        loss alone.

        A name with one slash, ``<metric>/<class>``, is a metric of one class, and a name with two,
        ``<metric>/<row>/<column>``, a cell of a matrix. Each of the two kinds is drawn in one plot
        for all classes, and printed nowhere.
        """
        return {"loss": self.loss(params, batch)}

    def predict(self, loaded: Any, lines: Sequence[str], top: int = 0) -> Iterable[str]:
        """Returns what ``optim-zoo predict`` prints for a text.

        The default has no predictions.

        Args:
          loaded: what `optim_zoo.train.load` returned for the run: parameters, tokenizer, step.
          lines: the lines of the text, without line ends. What a line is, such as a sentence or a
            word, is the task's choice.
          top: how many candidates to show for each prediction, with their probabilities; 0 for
            the predictions alone.

        Returns:
          The lines to print, without line ends. Every error is raised before the first one.

        Raises:
          UserError: the task has no predictions or no candidates, or a line cannot be used.
        """
        del loaded, lines, top
        raise UserError(f"a run of {type(self).__name__} has no predictions, only metrics")

    def units(self, stage: Stage) -> int:
        """Returns how many units (see ``unit``) a batch of this stage has."""
        return stage.batch_size
