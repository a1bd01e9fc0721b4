"""The interface of a sink, to which a run writes while it trains.

``docs/your_own_sink.md`` shows how to write one and name it in a config.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from optim_zoo.train.tasks.base import Baseline


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What a sink may need to know about a run."""

    folder: Path  # the run folder, which exists
    task: str  # task.name
    config: Mapping[str, Mapping[str, Any]]  # section -> key -> value
    machine: Mapping[str, str]  # devices, cores and versions
    start: int  # the number of steps made before this start; 0 for a new run
    total_steps: int
    unit: str  # what the task counts: "tokens"
    loss_unit: str  # "nats", or ""
    baseline: Baseline | None
    notes: Sequence[str]  # sentences about the start, such as what the run resumes from
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the data: name -> text
    parameters: int = 0  # the number of parameters
    total_units: int = 0  # the units of all steps
    weight_unit: str = ""  # what the weights of the loss count: "masked tokens", or ""


class Sink(Protocol):
    """Receives what a run logs. Only process 0 has sinks.

    The methods are called in this order: ``open``, then ``log`` and ``evaluate`` whenever they are
    due, then ``close``. A sink receives the figures of step n before the checkpoint of step n is
    saved. After a kill the steps since the last checkpoint are run and logged again.
    """

    def open(self, run: RunInfo) -> None:
        """Prepares the sink. Called once, before the first step."""

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Receives the figures of a step.

        Called every ``output.log_every`` steps and after the last step.

        Args:
          step: the number of steps made.
          figures: scalars by name, such as ``loss``, ``learning_rate``, ``tokens`` and
            ``tokens_per_second``. A name with a slash (``trust_ratio/<path>``) belongs to one leaf
            of the parameters; its value is an array where the leaf holds several layers.
        """

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Receives the held-out metrics of the task. Called after every evaluation.

        A name with a slash belongs to one class (``f1/<class>``), and a name with two slashes to a
        pair of classes (``confusion/<class>/<predicted class>``).
        """

    def close(self, finished: bool) -> None:
        """Finishes the sink. Called once; ``finished`` is false if the run ends early."""


def shown_name(metric: str) -> str:
    """Returns the name of a metric for people: F1 for ``f1``, and ``f1/string`` as ``F1/string``.

    Other names are spelt alike in the files and for people.
    """
    name, slash, more = metric.partition("/")
    return {"f1": "F1"}.get(name, name) + slash + more


@contextlib.contextmanager
def opened(sinks: Sequence[Sink], run: RunInfo) -> Iterator[None]:
    """Opens the sinks in order, and closes them in reverse order however the block ends."""
    finished = False

    def close(sink: Sink) -> None:
        sink.close(finished)

    with contextlib.ExitStack() as stack:
        for sink in sinks:
            sink.open(run)
            stack.callback(close, sink)
        yield
        finished = True
