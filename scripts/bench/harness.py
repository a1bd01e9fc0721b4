"""The harness of all benchmarks: compiled steps, timing in turns, memory, printed JSON lines."""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from optim_zoo.tree import Tree

WARMUP_ROUNDS = 5
# The arguments of all optimizers that are compared.
LEARNING_RATE = 1e-3
LAMB: Mapping[str, Any] = {"weight_decay": 0.01}
LARS: Mapping[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4}
RESERVED_BYTES = 2**30  # never allocated: XLA, Python and the rest of the machine need them
# Makes random parameters about as large as BERT's are compared with its gradients. The time of a
# step does not depend on it.
PARAMETERS_OVER_GRADIENTS = 20


class Step:
    """A function (params, state, *inputs) -> (params, state, ...), compiled; donates the first two.

    It is compiled from shapes, so that its memory is known before anything is allocated. `start`
    gives it arrays, and each call continues from the parameters and the state of the previous one.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        function: Callable[..., Tree],
        params: Tree,
        inputs: Sequence[Tree],
    ) -> None:
        state = jax.eval_shape(tx.init, params)
        began = time.perf_counter()
        lowered = jax.jit(function, donate_argnums=(0, 1)).lower(params, state, *inputs)
        self.lower_seconds = time.perf_counter() - began
        self._step: Any = lowered.compile()
        self.compile_seconds = time.perf_counter() - began - self.lower_seconds
        self._init = tx.init
        self.parameter_bytes, self.state_bytes = tree_bytes(params), tree_bytes(state)
        memory: Any = self._step.memory_analysis()
        self.temporary_bytes: int = memory.temp_size_in_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that it keeps between calls: parameters and state."""
        return self.parameter_bytes + self.state_bytes

    @property
    def temporaries(self) -> float:
        """Bytes that XLA allocates during a step, in multiples of the parameters."""
        return self.temporary_bytes / self.parameter_bytes

    @property
    def bytes_accessed(self) -> float:
        """Bytes read and written in a step, by XLA's cost model."""
        return self._step.cost_analysis()["bytes accessed"]

    @property
    def text(self) -> str:
        """Returns the optimized program as HLO text."""
        return self._step.as_text()

    def start(self, params: Tree, *inputs: Sequence[Tree]) -> None:
        """Sets the parameters and the inputs of the calls that follow.

        Args:
          params: the parameters, which the first call donates.
          inputs: the inputs of the first call, of the second, and so on. After the last of them the
            calls use the first again.
        """
        self._carry = (params, jax.jit(self._init)(params))
        self._inputs, self._turn = inputs, 0

    def __call__(self) -> Tree:
        """Makes one step, and returns all that the function returns."""
        made = self._step(*self._carry, *self._inputs[self._turn % len(self._inputs)])
        self._carry, self._turn = made[:2], self._turn + 1
        return made


def update(
    tx: optax.GradientTransformation, read: Callable[[Tree], Tree] | None = None
) -> Callable[[Tree, Tree, Tree], Tree]:
    """Returns a function for `Step` that computes updates from given gradients and applies them.

    Args:
      tx: the optimizer.
      read: a further output of the step, as a function of the new state. None adds no output.
    """

    def step(params: Tree, state: Tree, gradients: Tree) -> Tree:
        updates, state = tx.update(gradients, state, params)
        made = optax.apply_updates(params, updates), state
        return made if read is None else (*made, read(state))

    return step


def interleaved(
    candidates: Mapping[str, Callable[[], Tree]],
    rounds: int,
    *,
    calls: int | None = None,
    until: float = math.inf,
) -> dict[str, list[float]]:
    """Milliseconds of each call. The candidates take turns, so that noise affects all alike.

    On a GPU each turn consists of several calls that are queued as in a training job, and the time
    is their mean. With a single call per turn it would be the time of the host, which waits for
    every one of many small kernels.

    Args:
      candidates: what to time, keyed by name. A candidate may return any object that has
        ``block_until_ready()``.
      rounds: how many turns of each candidate are measured.
      calls: how many calls one turn has. None means 10 on a GPU and 1 elsewhere.
      until: the ``time.monotonic()`` after which no further round starts; two are always measured.
    """
    if calls is None:
        calls = 10 if jax.default_backend() == "gpu" else 1
    milliseconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(WARMUP_ROUNDS + rounds):
        if turn >= WARMUP_ROUNDS + 2 and time.monotonic() > until:
            break
        for name, call in candidates.items():
            began = time.perf_counter()
            for _ in range(calls):
                made = call()
            jax.block_until_ready(made)
            if turn >= WARMUP_ROUNDS:
                milliseconds[name].append(1e3 * (time.perf_counter() - began) / calls)
    return milliseconds


def spread(milliseconds: Sequence[float]) -> dict[str, Any]:
    """Returns the median and the quartiles, under the names that are printed."""
    # "inclusive" keeps the quartiles of a few values between the least and the greatest of them.
    low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return {"median_ms": median, "quartiles_ms": [low, high]}


def machine() -> dict[str, Any]:
    """Returns the device and the versions that a time depends on."""
    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "optax": optax.__version__,
    }


def show(what: str, *facts: Mapping[str, Any]) -> dict[str, Any]:
    """Prints ``what`` and all ``facts`` as one JSON line, and returns them."""
    line: dict[str, Any] = {"what": what}
    for part in facts:
        line |= part
    print(json.dumps(line), flush=True)
    return line


def lacking(needed_bytes: float) -> str:
    """Returns "" where the device has so much free memory, else a text that says how much it has.

    Args:
      needed_bytes: the bytes of all arrays at the worst moment.
    """
    free = _free_bytes() - RESERVED_BYTES
    if needed_bytes <= free:
        return ""
    return f"needs {needed_bytes / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB are free"


def _free_bytes() -> float:
    stats = jax.devices()[0].memory_stats()
    if stats:  # a GPU has them, a CPU does not
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if sys.platform != "linux":
        return float("inf")
    with open("/proc/meminfo", encoding="ascii") as file:
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in file}
    return 1024 * kilobytes["MemAvailable"]


def tree_bytes(tree: Tree) -> int:
    """Bytes of all leaves, which may be shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def parameters(tree: Tree) -> int:
    """Returns the number of entries of all leaves, which may be shapes."""
    return sum(x.size for x in jax.tree.leaves(tree))


def square_leaves(parameters: int, leaves: int, dtype: str = "float32") -> dict[str, Tree]:
    """Returns ``leaves`` equal square shapes with about ``parameters`` entries together."""
    side = max(1, round((parameters / leaves) ** 0.5))
    return {f"leaf_{i}": jax.ShapeDtypeStruct((side, side), dtype) for i in range(leaves)}


def random_gradients(params: Tree) -> Tree:
    """Returns normal values of the size of gradients, like ``params`` in shapes and dtypes."""
    key = jax.random.key(0)
    return jax.tree.map(
        lambda x, i: 1e-3 * jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype),
        params,
        jax.tree.unflatten(jax.tree.structure(params), range(len(jax.tree.leaves(params)))),
    )


def random_parameters(gradients: Tree) -> Tree:
    """Returns new parameters for these gradients, which a step may donate."""
    return jax.tree.map(lambda g: PARAMETERS_OVER_GRADIENTS * g, gradients)
