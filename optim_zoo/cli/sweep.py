"""``optim-zoo sweep FILE [key=value ...]``."""

import argparse
import os
import sys
from pathlib import Path

from optim_zoo.cli import ending


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "sweep",
        help="train every combination of values, or search for learning rates",
        description="Trains every combination of values that a TOML file lists for keys of a "
        "config, or searches for the learning rate of each optimizer. Results are written to "
        "results.jsonl. The same command continues a sweep that was stopped.",
    )
    parser.add_argument("file", type=Path, help="a TOML file, such as configs/sweeps/digits.toml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="a key of the sweep file, such as jobs=4 or dir=runs/trial, or a key of the config "
        "for all runs, such as train.steps=100",
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Runs what is left of a sweep; returns 1 if a run failed for another reason than diverging."""
    # Imported lazily: the other commands work without the extra `train`.
    from optim_zoo.lab import processes, results, sweep, sweep_file

    sys.path.append(os.getcwd())  # to find the user's own tasks, as `train` does
    described = sweep_file.load(parsed.file, parsed.overrides)
    try:
        rows = sweep.run(described, lambda line: print(line, flush=True))
    except processes.Interrupted as stopped:
        advice = f"stopped; the same command continues the sweep in {described.folder}"
        return ending.say(128 + stopped.signal_number, ending.line(advice))
    counts = {
        status: sum(row["status"] == status for row in rows)
        for status in (results.FINISHED, results.DIVERGED, results.FAILED)
    }
    print(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    print(f"results: {described.folder / 'results.jsonl'}")
    print(f"report: optim-zoo report {described.folder}")
    if counts[results.FAILED]:
        print("retry=true runs failed runs again; their output is in their folders")
    return 1 if counts[results.FAILED] else 0
