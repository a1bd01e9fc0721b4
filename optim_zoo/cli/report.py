"""``optim-zoo report SWEEP``."""

import argparse
import os
import sys
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "report",
        help="compare the runs of a sweep, on one page with plots",
        description="Writes report.html and its plots into the folder of a sweep, from the runs "
        "that have ended.",
    )
    parser.add_argument("sweep", type=Path, help="the folder of a sweep, or its TOML file")
    parser.add_argument(
        "--target",
        type=float,
        metavar="VALUE",
        help="the value of the metric for steps-to-target; by default one that all seeds of "
        "every best learning rate reach",
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Writes the report of a sweep."""
    from optim_zoo.lab import report  # lazily: it needs the extra `train`

    sys.path.append(os.getcwd())  # to find the user's own tasks, as `train` does
    print(f"report: {report.write(report.folder_of(parsed.sweep), parsed.target)}")
    return 0
