"""``optim-zoo reproduce [NAME] [--quick] [--dir FOLDER]``."""

import argparse
import time
from pathlib import Path

from optim_zoo.cli import ending


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "reproduce",
        help="measure what a paper claims, and write a page about it",
        description="Runs an experiment that measures what a paper claims. Without a name, lists "
        "the experiments. Results, plots and a page are written to a folder.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="an experiment of the list")
    parser.add_argument(
        "--quick", action="store_true", help="run a small version, whose figures mean nothing"
    )
    parser.add_argument(
        "--dir",
        type=Path,
        metavar="FOLDER",
        help="where to write; runs/reproduce/NAME by default, or runs/reproduce/NAME-quick",
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Runs an experiment, or lists all of them."""
    # Imported lazily, as other commands do not need them.
    from optim_zoo.lab.experiments import EXPERIMENTS, find

    if parsed.name is None:
        width = max(map(len, EXPERIMENTS))
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:{width}}  {experiment.summary}")
        return 0
    reproduce = find(parsed.name)
    name = f"{parsed.name}-quick" if parsed.quick else parsed.name
    folder = parsed.dir or Path("runs", "reproduce", name)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    from optim_zoo.train import distributed  # of the extra, which listing does not need

    try:
        page = reproduce(folder, quick=parsed.quick, say=lambda line: print(line, flush=True))
    except distributed.Stopped as stopped:  # in a training run that is part of the experiment
        return ending.say(128 + stopped.signal_number, ending.line(stopped))
    print(f"page: {page}")
    print(f"time: {time.perf_counter() - began:.0f} s")
    return 0
