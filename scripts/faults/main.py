"""Makes faults happen to training jobs, and reports in a table what the jobs do.

    python scripts/faults/main.py [FAULT ...] [--table] [--kills 20] [--seed 0] [--jobs 2]
        [--config FILE]

Prints one JSON line per fault and, with ``--table``, a Markdown table that is made from these lines
alone. The jobs run the user's command in processes of their own, on the CPU, with a shortened
``configs/smoke.toml`` on the source text of this package. What they leave is compared bit for bit
with an unbroken run, or, after skipped steps, with a run that is never given those batches.

Faulty batches, gradients, losses and clocks are injected by ``injection.py``, which wraps the task
of the job and runs the same command. The clock that jumps is the wall clock as Python code reads
it, ``time.time`` and ``time.time_ns``. A full disk is a small tmpfs, which only root can mount; no
other fault needs root.
"""

import argparse
import concurrent.futures
import functools
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax

from faults import FAULTS, try_fault
from jobs import SMOKE, Site
from table import table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--table", action="store_true", help="a Markdown table too")
    parser.add_argument("--kills", type=int, default=20, help="how often kill -9 (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills (0)")
    parser.add_argument("--jobs", type=int, default=2, help="faults tried at a time (2)")
    parser.add_argument("--config", type=Path, default=SMOKE, help="of the jobs (smoke.toml)")
    parsed = parser.parse_args(arguments)
    unknown = set(parsed.faults) - FAULTS.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(FAULTS)}")
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax warns of what it does not need
    records = []
    with (
        tempfile.TemporaryDirectory() as work,
        Site(Path(work), parsed.config, kills=parsed.kills, seed=parsed.seed) as site,
        concurrent.futures.ThreadPoolExecutor(parsed.jobs) as pool,
    ):
        site.finished()  # first, because most faults compare with it
        for record in pool.map(functools.partial(try_fault, site), parsed.faults or FAULTS):
            records.append(record)
            print(json.dumps(record), flush=True)
    if parsed.table:
        print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
