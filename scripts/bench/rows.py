"""Measures a step on a few rows of a table: `lazy_adam`, and Adam on the whole table.

    python scripts/bench/rows.py [--rounds N] [--torch-threads N]

The candidates take turns in one process on a table of 1,000,000 rows of 128: `lazy_adam`;
`optax.adam` on the dense gradient that ``jax.grad`` of a gather computes; and, where torch can be
imported, `torch.optim.SparseAdam`. Then `lazy_adam` is measured on tables of 250,000 and 4,000,000
rows. Each step reads 8,192 ids drawn from a Zipf distribution with exponent 1. There are 16 batches
of ids, which all candidates use in the same order. JAX's steps are jitted and donate their
arguments. torch uses one thread by default, because several threads that wait for one another were
ten times slower on a machine with other work.

Prints one JSON line per measurement (the median and the quartiles in milliseconds, and the
temporaries that XLA allocates, in multiples of the table), then one line of ratios. Needs about
8 GB of memory.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

import harness
import optim_zoo
from optim_zoo.tree import Tree

WIDTH = 128
BATCH = 8192
BATCHES = 16
ROWS = 1_000_000
FEW_ROWS, MANY_ROWS = 250_000, 4_000_000
OURS = "optim_zoo.lazy_adam"
ROUNDS = 100


class Batches:
    """The ids of each step, and one gradient for each id."""

    def __init__(self, num_rows: int) -> None:
        rng = np.random.default_rng(0)
        cumulative = np.cumsum(1 / np.arange(1, num_rows + 1))  # the most frequent row first
        ranks = np.searchsorted(cumulative, cumulative[-1] * rng.random((BATCHES, BATCH)))
        self.ids: npt.NDArray[np.int32] = rng.permutation(num_rows).astype(np.int32)[ranks]
        self.rows = rng.normal(size=(BATCH, WIDTH)).astype(np.float32)
        self.num_rows = num_rows
        self.different_ids = statistics.median(len(np.unique(ids)) for ids in self.ids)


Step = Callable[[], Any]


class TorchSparseAdam:
    """`torch.optim.SparseAdam` with the gradients that ``Embedding(sparse=True)`` computes."""

    def __init__(self, batches: Batches) -> None:
        import torch

        shape = (batches.num_rows, WIDTH)
        self._table = torch.nn.Parameter(torch.zeros(shape))
        self._adam = torch.optim.SparseAdam([self._table], lr=harness.LEARNING_RATE)
        rows = torch.from_numpy(batches.rows)
        self._gradients = [
            torch.sparse_coo_tensor(
                torch.from_numpy(ids[None].astype(np.int64)), rows, shape, check_invariants=False
            )
            for ids in batches.ids
        ]
        self._turn = 0

    def __call__(self) -> None:
        """Makes one step."""
        self._table.grad = self._gradients[self._turn % BATCHES]
        self._adam.step()
        self._turn += 1


def lazy(batches: Batches) -> harness.Step:
    return _jax_step(batches, optim_zoo.lazy_adam(harness.LEARNING_RATE), optim_zoo.SparseRows)


def dense(batches: Batches) -> harness.Step:
    def gradient(ids: jax.Array, rows: jax.Array, num_rows: int) -> jax.Array:
        return jnp.zeros((num_rows, WIDTH)).at[ids].add(rows)

    return _jax_step(batches, optax.adam(harness.LEARNING_RATE), gradient)


def _jax_step(
    batches: Batches, tx: optax.GradientTransformation, gradient: Callable[..., Any]
) -> harness.Step:
    def step(table: jax.Array, state: Tree, ids: jax.Array, rows: jax.Array) -> Tree:
        updates, state = tx.update(gradient(ids, rows, batches.num_rows), state, table)
        return optim_zoo.apply_updates(table, updates), state

    table, rows = jnp.zeros((batches.num_rows, WIDTH)), jnp.asarray(batches.rows)
    inputs = [(jnp.asarray(ids), rows) for ids in batches.ids]
    compiled = harness.Step(tx, step, table, inputs[0])
    compiled.start(table, *inputs)
    return compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--torch-threads", type=int, default=1)
    arguments = parser.parse_args()
    rounds = arguments.rounds
    common = {
        "width": WIDTH,
        "ids": BATCH,
        "rounds": rounds,
        **harness.machine(),
    }
    peers: dict[str, Callable[[Batches], Step]] = {OURS: lazy, "optax.adam": dense}
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(arguments.torch_threads)
        common |= {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
        peers["torch.optim.SparseAdam"] = TorchSparseAdam
    batches = Batches(ROWS)
    ours, *theirs = measure({name: (make, batches) for name, make in peers.items()}, rounds, common)
    ratios = {f"{name} / ours": m / ours for name, m in zip(list(peers)[1:], theirs, strict=True)}
    sizes = {f"{OURS} of {n} rows": (lazy, Batches(n)) for n in (FEW_ROWS, MANY_ROWS)}
    few, many = measure(sizes, rounds, common)
    ratios[f"{MANY_ROWS} rows / {FEW_ROWS} rows"] = many / few
    harness.show("ratios of medians", ratios, common)


def measure(
    candidates: Mapping[str, tuple[Callable[[Batches], Step], Batches]],
    rounds: int,
    common: Mapping[str, Any],
) -> list[float]:
    """Times the candidates in turns, prints their lines and returns the median milliseconds."""
    steps = {name: make(batches) for name, (make, batches) in candidates.items()}
    medians = []
    for name, milliseconds in harness.interleaved(steps, rounds).items():
        step, batches = steps[name], candidates[name][1]
        measured = harness.spread(milliseconds)
        medians.append(measured["median_ms"])
        if isinstance(step, harness.Step):
            measured["temporaries_per_table"] = step.temporaries
        measured |= {"num_rows": batches.num_rows, "different_ids": batches.different_ids}
        harness.show(name, measured, common)
    return medians


if __name__ == "__main__":
    main()
