"""Measures what an update costs to compile on a CPU, and to run with bfloat16 parameters.

    python scripts/bench/compile_time.py [--leaves 50 200 800] [--optimizers NAME ...]
    python scripts/bench/compile_time.py --bfloat16 [--rounds 20]

Prints JSON lines. The first form compiles the update of a tree of small leaves in a fresh process
for every optimizer and number of leaves, one after another: CPU seconds, peak memory, and lines of
the optimized program. The second form times updates of a tree like BERT-base, optimizers taking
turns.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from optim_zoo import accumulation, clip_by_global_norm, guards, lamb, lars, metrics, precision

Tree = Any
Make = Callable[[], optax.GradientTransformation]
SIDE = 16  # of a leaf that is compiled; the time does not depend on it
DECAY = 0.01
WARMUP_ROUNDS = 3


def _readme_stack() -> optax.GradientTransformation:
    """Returns the stack of wrappers that docs/concepts.md shows."""
    tx = optax.chain(clip_by_global_norm(1.0), lamb(1e-3, weight_decay=DECAY))
    tx = precision.master_weights(metrics.with_metrics(tx))
    return accumulation.accumulate(guards.skip_nonfinite(tx), every=4)


COMPILED: Mapping[str, Make] = {
    "lamb": lambda: lamb(1e-3, weight_decay=DECAY),
    "skip_nonfinite(lamb)": lambda: guards.skip_nonfinite(lamb(1e-3, weight_decay=DECAY)),
    "README stack": _readme_stack,
    "optax.lamb": lambda: optax.lamb(1e-3, weight_decay=DECAY),
    "optax.apply_if_finite(optax.lamb)": lambda: optax.apply_if_finite(
        optax.lamb(1e-3, weight_decay=DECAY), max_consecutive_errors=10
    ),
}
# The optimizers of a group are timed in turns.
TIMED: Mapping[str, Mapping[str, Make]] = {
    "lamb": {
        "lamb": lambda: lamb(1e-3, weight_decay=DECAY),
        "optax.lamb": lambda: optax.lamb(1e-3, weight_decay=DECAY),
    },
    "lars": {
        "lars": lambda: lars(1e-3, weight_decay=1e-4),
        "optax.lars": lambda: optax.lars(1e-3, weight_decay=1e-4),
    },
}


def bert_base(dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of BERT-base with its head: 202 arrays, 109.5 million parameters."""
    width, wide, words = 768, 3072, 30522
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings/words": (words, width),
        "embeddings/positions": (512, width),
        "embeddings/types": (2, width),
        "head/kernel": (width, width),
        "head/bias": (width,),
        "head/words_bias": (words,),
    }
    norms = ["embeddings/norm", "head/norm"]
    for layer in (f"layer_{i}" for i in range(12)):
        for name in ("query", "key", "value", "output"):
            shapes[f"{layer}/{name}/kernel"] = (width, width)
            shapes[f"{layer}/{name}/bias"] = (width,)
        shapes[f"{layer}/up/kernel"], shapes[f"{layer}/up/bias"] = (width, wide), (wide,)
        shapes[f"{layer}/down/kernel"], shapes[f"{layer}/down/bias"] = (wide, width), (width,)
        norms += [f"{layer}/attention_norm", f"{layer}/norm"]
    for norm in norms:
        shapes[f"{norm}/scale"] = shapes[f"{norm}/bias"] = (width,)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def small_leaves(leaves: int, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of ``leaves`` small square matrices."""
    return {f"leaf_{i}": jax.ShapeDtypeStruct((SIDE, SIDE), dtype) for i in range(leaves)}


def _lowered(tx: optax.GradientTransformation, params: Tree) -> Any:
    """Lowers one step; parameters and state are donated."""

    def step(params: Tree, state: Tree, gradients: Tree) -> tuple[Tree, Tree]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)


def measure_compilation(name: str, leaves: int, dtype: str) -> dict[str, Any]:
    """Measures the compilation of the update of ``name``. The process must be fresh."""
    jax.devices()  # starts the backend, which is not measured
    before = _peak_megabytes()
    began, wall = time.process_time(), time.perf_counter()
    lowered = _lowered(COMPILED[name](), small_leaves(leaves, dtype))
    traced, traced_wall = time.process_time(), time.perf_counter()
    compiled = lowered.compile()
    return {
        "trace_cpu_s": round(traced - began, 2),
        "compile_cpu_s": round(time.process_time() - traced, 2),
        "trace_s": round(traced_wall - wall, 2),
        "compile_s": round(time.perf_counter() - traced_wall, 2),
        "peak_memory_mb": round(_peak_megabytes()),
        "peak_memory_before_mb": round(before),
        "program_lines": len(compiled.as_text().splitlines()),
    }


def _peak_megabytes() -> float:
    """Returns the peak memory of this process. Linux counts kilobytes, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def compile_all(arguments: argparse.Namespace) -> None:
    """Prints one line for every optimizer and number of leaves, each from a fresh process."""
    for leaves in arguments.leaves:
        for name in arguments.optimizers:
            facts: dict[str, Any] = {"leaves": leaves, "dtype": arguments.dtype}
            if arguments.label:
                facts["label"] = arguments.label
            command = [sys.executable, __file__, "--dtype", arguments.dtype]
            command += ["--here", "--leaves", str(leaves), "--optimizers", name]
            began = time.monotonic()
            try:
                done = subprocess.run(
                    command, timeout=arguments.seconds, capture_output=True, text=True, check=True
                )
            except subprocess.TimeoutExpired:
                show("compile", {"optimizer": name}, facts, {"stopped_after_s": arguments.seconds})
                continue
            except subprocess.CalledProcessError as error:
                sys.exit(f"{name} with {leaves} leaves: {error.stderr}")
            facts["process_s"] = round(time.monotonic() - began, 1)
            show("compile", {"optimizer": name}, facts, json.loads(done.stdout), machine())


def time_bfloat16(
    shapes: dict[str, jax.ShapeDtypeStruct], rounds: int, label: str | None = None
) -> None:
    """Prints one line for every optimizer of every group in `TIMED`."""
    size = sum(x.size * x.dtype.itemsize for x in shapes.values())
    for group in TIMED.values():
        steps, carried, temporaries = {}, {}, {}
        gradients = _normal(shapes, 1e-3)
        for name, make in group.items():
            tx = make()
            steps[name] = _lowered(tx, shapes).compile()
            temporaries[name] = steps[name].memory_analysis().temp_size_in_bytes / size
            params = _normal(shapes, 2e-2)
            carried[name] = (params, jax.jit(tx.init)(params))
            del params  # is donated
        milliseconds: dict[str, list[float]] = {name: [] for name in group}
        for turn in range(WARMUP_ROUNDS + rounds):
            for name, step in steps.items():
                began = time.perf_counter()
                carried[name] = jax.block_until_ready(step(*carried[name], gradients))
                if turn >= WARMUP_ROUNDS:
                    milliseconds[name].append(1e3 * (time.perf_counter() - began))
        for name, times in milliseconds.items():
            low, median, high = statistics.quantiles(times, n=4, method="inclusive")
            facts = {
                "optimizer": name,
                "dtype": "bfloat16",
                "parameters": sum(x.size for x in shapes.values()),
                "leaves": len(shapes),
                "rounds": rounds,
                "median_ms": round(median, 1),
                "quartiles_ms": [round(low, 1), round(high, 1)],
                "temporaries_per_parameter_bytes": round(temporaries[name], 4),
            }
            show("update", facts, {"label": label} if label else {}, machine())


def _normal(shapes: dict[str, jax.ShapeDtypeStruct], scale: float) -> dict[str, jax.Array]:
    key = jax.random.key(0)
    return {
        name: (scale * jax.random.normal(jax.random.fold_in(key, i), x.shape)).astype(x.dtype)
        for i, (name, x) in enumerate(shapes.items())
    }


def machine() -> dict[str, Any]:
    """Describes the machine and the versions that a measurement depends on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "load_average": round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def show(what: str, *facts: Mapping[str, Any]) -> None:
    """Prints one JSON line."""
    line: dict[str, Any] = {"what": what}
    for part in facts:
        line |= part
    print(json.dumps(line), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leaves", nargs="+", type=int, default=[50, 200, 800])
    parser.add_argument("--optimizers", nargs="+", choices=COMPILED, default=list(COMPILED))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=300, help="limit for each process")
    parser.add_argument("--here", action="store_true", help="compile in this process")
    parser.add_argument("--bfloat16", action="store_true", help="time updates of BERT-base instead")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--label", help="is part of every line, such as the version measured")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, for quartiles, got {arguments.rounds}")
    if arguments.bfloat16:
        time_bfloat16(bert_base("bfloat16"), arguments.rounds, arguments.label)
    elif arguments.here:
        for leaves in arguments.leaves:
            for name in arguments.optimizers:
                print(json.dumps(measure_compilation(name, leaves, arguments.dtype)))
    else:
        compile_all(arguments)


if __name__ == "__main__":
    main()
