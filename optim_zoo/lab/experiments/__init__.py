"""Experiments that measure what papers claim: ``optim-zoo reproduce NAME``.

Each one is a module with a function ``run(folder, quick, say)``. It writes ``results.jsonl``, PNGs
and a Markdown page into the folder, says in lines what it does, and returns the path of the page.
"""

import dataclasses
import difflib
import importlib
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from optim_zoo.errors import UserError


class Say(Protocol):
    """Prints a line."""

    def __call__(self, line: str) -> None:
        """Prints the line."""


class Run(Protocol):
    """Runs an experiment whole."""

    def __call__(self, folder: Path, *, quick: bool, say: Say) -> Path:
        """Runs it, writes into an existing folder, and returns the path of the page.

        Args:
          folder: where the results, the plots and the page are written.
          quick: whether to run a small version, which takes seconds and whose figures mean nothing.
          say: prints a line.
        """


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment, without its code, so that listing them imports no training."""

    summary: str  # what it measures, in half a line
    module: str  # the module that has `run`


EXPERIMENTS = MappingProxyType(
    {
        "batch-scaling": Experiment(
            "optimizers at four batch sizes, tuned and untuned (arXiv 1904.00962, 2102.06356)",
            "optim_zoo.lab.experiments.batch_scaling",
        ),
        "lars-lamb": Experiment(
            "LARS and LAMB on attention and on images (arXiv 1904.00962, 1708.03888)",
            "optim_zoo.lab.experiments.lars_lamb",
        ),
        "weight-decay": Experiment(
            "L2 regularization compared with decoupled weight decay, in Adam (arXiv 1711.05101)",
            "optim_zoo.lab.experiments.weight_decay",
        ),
        "warmup": Experiment(
            "warmup in place of bias correction, in AdamW and LAMB (arXiv 1810.04805)",
            "optim_zoo.lab.experiments.warmup",
        ),
        "fine-tuning-zero": Experiment(
            "why Lookahead and Ranger scored zero when fine-tuning BERT",
            "optim_zoo.lab.experiments.fine_tuning_zero",
        ),
    }
)


def find(name: str) -> Run:
    """Returns the function that runs an experiment.

    Raises:
      UserError: there is no experiment of this name.
    """
    if name not in EXPERIMENTS:
        close = difflib.get_close_matches(name, EXPERIMENTS, n=1, cutoff=0.4)
        advice = f"did you mean {close[0]}? " if close else ""
        names = ", ".join(EXPERIMENTS)
        raise UserError(f"there is no experiment {name!r}: {advice}the experiments are {names}")
    found: Run = importlib.import_module(EXPERIMENTS[name].module).run
    return found
