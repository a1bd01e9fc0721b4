"""Shows where optax's wrappers behave differently from the wrappers of this library.

    python scripts/bench/against_optax.py [--table]

Each row is a small experiment that runs here on eight virtual CPU devices; all of them take seconds
together. The cells are composed from what was measured. Prints one JSON line per row; with
``--table`` a Markdown table of the same rows at the end.
"""

import argparse
from collections.abc import Callable, Sequence

import jax
import optax

import harness
from experiments import accumulation, guards, metrics, precision
from experiments.guards import DEVICES
from experiments.trajectories import Row

EXPERIMENTS: Sequence[Callable[[], Row]] = (
    accumulation.nan_micro_batch,
    accumulation.inner_calls,
    accumulation.token_weights,
    accumulation.low_precision_mean,
    precision.small_steps,
    precision.second_moment,
    precision.state_dtypes,
    guards.nans_in_a_row,
    guards.nan_on_one_device,
    guards.spike,
    guards.negative_zero,
    metrics.metrics_in_scan,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="Markdown at the end")
    arguments = parser.parse_args(argv)
    rows = []
    for experiment in EXPERIMENTS:
        row = experiment()
        rows.append(row)
        cells = {"situation": row.situation, "optax": row.optax, "optim_zoo": row.optim_zoo}
        versions = {"jax": jax.__version__, "optax_version": optax.__version__}
        harness.show(experiment.__name__, {**cells, **row.figures, **versions})
    if arguments.table:
        print(table(rows))


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [f"| situation | optax {optax.__version__} | optim_zoo |", "|---|---|---|"]
    lines += [f"| {row.situation} | {row.optax} | {row.optim_zoo} |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main()
