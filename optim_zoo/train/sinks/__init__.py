"""What a run writes while it trains: metrics, progress, plots and a report."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from optim_zoo.train import import_paths
from optim_zoo.train.sinks.base import Sink
from optim_zoo.train.sinks.jsonl import JsonLines

SINKS: Mapping[str, str] = MappingProxyType(
    {
        "progress": "optim_zoo.train.sinks.progress:Progress",
        "plots": "optim_zoo.train.sinks.plots:Plots",
        "report": "optim_zoo.train.sinks.report:Report",
    }
)
"""Name -> import path of a class, which is called without arguments."""


def check(names: Sequence[str]) -> None:
    """Checks names of sinks, and imports those of the user.

    Raises:
      ArgumentValueError: see `make`.
    """
    for name in names:
        if name not in SINKS:  # those need matplotlib, which is not imported before a run
            import_paths.find("sink", name, SINKS, argument="sinks")


def make(names: Sequence[str]) -> list[Sink]:
    """Returns the sinks of ``output.sinks``, preceded by the one that writes ``metrics.jsonl``.

    Raises:
      ArgumentValueError: a name is neither in `SINKS` nor an import path that can be imported.
    """
    return [
        JsonLines(),
        *(import_paths.find("sink", name, SINKS, argument="sinks")() for name in names),
    ]
