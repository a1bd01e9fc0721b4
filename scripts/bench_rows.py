"""What a step on a few rows of a table costs: lazy_adam against Adam on the whole table.

    python scripts/bench_rows.py [--rounds N] [--torch-threads N]

Every step has fresh ids, 8,192 of a Zipf distribution with exponent 1, out of 16 batches that all
candidates go through in the same order. In one process and taking turns, on a table of 1,000,000
rows of 128: `lazy_adam`, `optax.adam` on the dense gradient that ``jax.grad`` of a gather makes,
and, where torch can be imported, `torch.optim.SparseAdam`, on one thread unless told: several,
waiting for one another, were ten times slower on a machine with other work. Then `lazy_adam` on
tables of 250,000 and 4,000,000 rows. JAX's steps are jitted and donate. Prints one JSON line a
measurement (the median and the quartiles in milliseconds, the temporaries XLA allocates in
multiples of the table), then one line of ratios. Needs about 8 GB of memory.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import bench_common
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

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
    """The ids of each step, with one gradient a row."""

    def __init__(self, num_rows: int) -> None:
        rng = np.random.default_rng(0)
        upto = np.cumsum(1 / np.arange(1, num_rows + 1))  # of the commonest row, the next, ...
        ranks = np.searchsorted(upto, upto[-1] * rng.random((BATCHES, BATCH)))
        self.ids: npt.NDArray[np.int32] = rng.permutation(num_rows).astype(np.int32)[ranks]
        self.rows = rng.normal(size=(BATCH, WIDTH)).astype(np.float32)
        self.num_rows = num_rows
        self.different_ids = statistics.median(len(np.unique(ids)) for ids in self.ids)


Step = Callable[[], Any]


class TorchSparseAdam:
    """`torch.optim.SparseAdam` with the gradient of ``Embedding(sparse=True)``."""

    def __init__(self, batches: Batches) -> None:
        import torch

        shape = (batches.num_rows, WIDTH)
        self._table = torch.nn.Parameter(torch.zeros(shape))
        self._adam = torch.optim.SparseAdam([self._table], lr=bench_common.LEARNING_RATE)
        rows = torch.from_numpy(batches.rows)
        self._gradients = [
            torch.sparse_coo_tensor(
                torch.from_numpy(ids[None].astype(np.int64)), rows, shape, check_invariants=False
            )
            for ids in batches.ids
        ]
        self._turn = 0

    def __call__(self) -> None:
        """One step."""
        self._table.grad = self._gradients[self._turn % BATCHES]
        self._adam.step()
        self._turn += 1


def lazy(batches: Batches) -> bench_common.Step:
    return _jax_step(batches, optim_zoo.lazy_adam(bench_common.LEARNING_RATE), optim_zoo.SparseRows)


def dense(batches: Batches) -> bench_common.Step:
    def gradient(ids: jax.Array, rows: jax.Array, num_rows: int) -> jax.Array:
        return jnp.zeros((num_rows, WIDTH)).at[ids].add(rows)

    return _jax_step(batches, optax.adam(bench_common.LEARNING_RATE), gradient)


def _jax_step(
    batches: Batches, tx: optax.GradientTransformation, gradient: Callable[..., Any]
) -> bench_common.Step:
    def step(table: jax.Array, state: Tree, ids: jax.Array, rows: jax.Array) -> Tree:
        updates, state = tx.update(gradient(ids, rows, batches.num_rows), state, table)
        return optim_zoo.apply_updates(table, updates), state

    table, rows = jnp.zeros((batches.num_rows, WIDTH)), jnp.asarray(batches.rows)
    inputs = [(jnp.asarray(ids), rows) for ids in batches.ids]
    compiled = bench_common.Step(tx, step, table, inputs[0])
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
        **bench_common.machine(),
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
    bench_common.show("ratios of medians", ratios, common)


def measure(
    candidates: Mapping[str, tuple[Callable[[Batches], Step], Batches]],
    rounds: int,
    common: Mapping[str, Any],
) -> list[float]:
    """The median milliseconds of each, the candidates taking turns; prints their lines."""
    steps = {name: make(batches) for name, (make, batches) in candidates.items()}
    medians = []
    for name, milliseconds in bench_common.interleaved(steps, rounds).items():
        step, batches = steps[name], candidates[name][1]
        measured = bench_common.spread(milliseconds)
        medians.append(measured["median_ms"])
        if isinstance(step, bench_common.Step):
            measured["temporaries_per_table"] = step.temporaries
        measured |= {"num_rows": batches.num_rows, "different_ids": batches.different_ids}
        bench_common.show(name, measured, common)
    return medians


if __name__ == "__main__":
    main()
