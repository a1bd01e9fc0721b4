"""How fast the device copies memory, by JAX and by torch, taking turns.

    python scripts/bench/gpu_bandwidth.py [--megabytes 1024] [--rounds N] [--seconds S]

The candidates are the pass of `update.ReadAndWrite`, which negates an array in place, a copy
into a new array by JAX, and torch's copy between two arrays (in a process of its own). All arrays
are float32. Prints one JSON line per candidate (``"measured": "bandwidth"``) with the median and
the quartiles in milliseconds, and the bytes read and written per second.
"""

import argparse
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

import gpu_lines
import harness
import torch_peer
import update
from optim_zoo.tree import Tree

ROUNDS = 30
JAX_COPY = "JAX, copy"
JAX_NEGATE = "JAX, negate in place"
# Shares of the section's time: torch is ready, and no further round begins.
READY_BY, MEASURED_BY = 0.6, 0.9


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1024, help="of one array, in 2^20 bytes")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=60.0, help="the section's time limit")
    arguments = parser.parse_args(argv)
    clock = gpu_lines.Clock(arguments.seconds)
    num_bytes = arguments.megabytes << 20
    common = {**gpu_lines.common("bandwidth"), "array_bytes": num_bytes, "dtype": "float32"}

    shape, device = (num_bytes // 4,), torch_peer.device()
    peer = None
    if device:
        peer = torch_peer.TorchPeer.start(torch_peer.COPY, [shape], "float32", device)
    else:
        gpu_lines.show_skipped(torch_peer.COPY, gpu_lines.NO_TORCH, common)
    array = jnp.ones(shape, jnp.float32)
    copy = jax.jit(jnp.copy)
    candidates: dict[str, Callable[[], Tree]] = {
        JAX_NEGATE: update.ReadAndWrite(num_bytes),
        JAX_COPY: lambda: copy(array),
    }
    try:
        if peer is not None:
            problem = peer.problem(clock.at(READY_BY))
            if problem:
                gpu_lines.show_skipped(torch_peer.COPY, problem, common)
            else:
                candidates[torch_peer.COPY] = peer
        until = clock.at(MEASURED_BY)
        milliseconds = harness.interleaved(candidates, arguments.rounds, until=until)
    finally:
        if peer is not None:
            peer.close()
    for name, times in milliseconds.items():
        measured = {"measured": "bandwidth", "rounds": len(times), **harness.spread(times)}
        measured["gigabytes_per_second"] = 2 * num_bytes / measured["median_ms"] / 1e6
        harness.show(name, common, measured)


if __name__ == "__main__":
    main()
