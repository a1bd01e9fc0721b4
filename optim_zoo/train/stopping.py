"""Which evaluation of a run is its best one, and how many have followed it without a better one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

_LOWER = ("loss", "error", "perplexity")  # how the names of metrics end that are better when lower


def metric_of(goal: str) -> str:
    """Returns the metric that ``output.keep_best`` names, without the sign."""
    return goal.removeprefix("-").removeprefix("+") if goal[:1] in ("-", "+") else goal


def is_lower_better(goal: str) -> bool:
    """Returns whether a lower value of a metric is a better one.

    ``-name`` says that it is, ``+name`` that it is not. Without a sign it is for a metric whose
    name ends in ``loss``, ``error`` or ``perplexity``.

    Args:
      goal: the value of ``output.keep_best``, such as ``f1``, ``loss`` or ``-edit_distance``.
    """
    return goal.startswith("-") or (not goal.startswith("+") and goal.endswith(_LOWER))


@dataclasses.dataclass(frozen=True)
class History:
    """What a run remembers of its evaluations. Each checkpoint records it.

    It is not read from ``metrics.jsonl``: a kill may leave evaluations there that the last
    checkpoint does not know, and only process 0 reads the file.
    """

    goal: str  # output.keep_best; "" if nothing is compared
    step: int = 0  # the step of the best evaluation; 0 before the first one
    value: float | None = None  # the metric there
    evaluated: int = 0  # the step of the last evaluation
    without_better: int = 0  # the number of evaluations after the best one

    @classmethod
    def of(cls, goal: str, record: Mapping[str, Any] | None) -> "History":
        """Returns the history that a checkpoint has recorded.

        It is empty if there is no record, or if the record is about another metric.

        Args:
          goal: ``output.keep_best`` of the resumed run.
          record: what `record` has returned, or None.
        """
        return cls(**record) if record and record["goal"] == goal else cls(goal)

    def record(self) -> dict[str, Any]:
        """Returns the history in JSON values."""
        return dataclasses.asdict(self)

    def after(self, step: int, metrics: Mapping[str, float]) -> "History":
        """Returns the history after an evaluation.

        A value equal to the best one is no better. An evaluation that is repeated, or that is not
        after the last one, changes nothing.

        Args:
          step: the number of steps made.
          metrics: the held-out metrics.
        """
        if not self.goal or step <= self.evaluated:
            return self
        value = metrics[metric_of(self.goal)]
        sign = -1 if is_lower_better(self.goal) else 1
        if self.value is None or sign * value > sign * self.value:
            return History(self.goal, step, value, step)
        return dataclasses.replace(self, evaluated=step, without_better=self.without_better + 1)
