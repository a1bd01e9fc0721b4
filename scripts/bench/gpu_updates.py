"""One optimizer update on one tree: this library, optax and torch, taking turns.

    python scripts/bench/gpu_updates.py --tree bert-large [--dtype bfloat16] [--rounds N]
        [--seconds S] [--compiled-timm SOCKET] [--wait-for SOCKET ...]

An update computes new parameters and state from given gradients; JAX's are jitted and donate. The
candidates are `lamb`, `lars` and `adamw` of this library and of optax, torch's fused AdamW, and
timm's Lamb, eager and under ``torch.compile``. torch runs in processes of its own
(`torch_peer.py`) and takes turns with the others. The compiled one must have been started already,
for the same tree and dtype, and listens at the first SOCKET. No time is taken before all processes
of ``--wait-for`` have compiled too, as far as the time limit allows, because they would disturb it.

In bfloat16, parameters and gradients are bfloat16, and so are the moments of optax and torch; the
moments of this library are float32.

Prints one JSON line per compiled program as soon as it is compiled (``"measured": "program"``),
then one per candidate with its time (``"time"``), and one per candidate that was left out
(``"skipped"``, with the reason):

    kernels_per_leaf              of the optimized program, counted by `hlo_kernels`
    kernels_on_largest_leaf       those that read or write an array of its size
    array_bytes_per_parameter     all arrays that its kernels read and write, over the parameters
    bytes_per_parameter           the same by XLA's cost model
    fewest_bytes_per_parameter    what a step with this state must read and write at least
    state_bytes_per_parameter
    temporaries_per_parameter     bytes XLA allocates during a step / bytes of the parameters
    median_ms, quartiles_ms       of one update
    gigabytes_per_second          fewest_bytes_per_parameter times the parameters, per second
    share_of_bandwidth            the same over that of "read and write", which negates 1 GiB in
                                  place (on a GPU)
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

import gpu_lines
import harness
import hlo_kernels
import torch_peer
import update
from optim_zoo import rules
from optim_zoo.tree import Tree
from trees import TREES

ROUNDS = 20
PEERS = (torch_peer.ADAMW, torch_peer.TIMM_LAMB)
OURS = "optim_zoo.lamb"
# Shares of the section's time: compilation ends, and no further round begins.
COMPILED_BY, MEASURED_BY = 0.75, 0.9


def optimizers(layers: rules.Rules) -> dict[str, optax.GradientTransformation]:
    """Returns the candidates that are optax transformations, the most important first."""
    both = {
        **update.optimizers("lamb", layers),
        **update.optimizers("lars", layers),
    }
    both.pop(update.METRICS_OUT)
    return both


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", choices=TREES, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=120.0, help="the section's time limit")
    parser.add_argument("--compiled-timm", type=Path, metavar="SOCKET")
    parser.add_argument("--wait-for", type=Path, nargs="*", default=(), metavar="SOCKET")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, for quartiles, got {arguments.rounds}")
    clock = gpu_lines.Clock(arguments.seconds)
    shapes, layers = TREES[arguments.tree]()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, arguments.dtype), shapes)
    common = {
        **gpu_lines.common(f"updates {arguments.tree} {arguments.dtype}"),
        "tree": arguments.tree,
        "dtype": arguments.dtype,
        "parameters": harness.parameters(shapes),
        "leaves": len(jax.tree.leaves(shapes)),
    }
    peers = _started_peers(shapes, arguments.dtype, common)
    try:
        compiled_by = clock.at(COMPILED_BY)
        steps = _compiled_steps(shapes, layers, compiled_by, common)
        late = [x.name for x in arguments.wait_for if not torch_peer.wait_for(x, compiled_by)]
        if arguments.compiled_timm:
            connected = torch_peer.TorchPeer.connect(arguments.compiled_timm, compiled_by)
            peers[torch_peer.COMPILED_TIMM_LAMB] = connected
        for name, peer in list(peers.items()):
            problem = peer.problem(compiled_by)
            if problem:
                peers.pop(name).close()
                gpu_lines.show_skipped(name, problem, common)
        common |= {"compiling_meanwhile": late}
        _measure(steps, peers, shapes, arguments.rounds, clock.at(MEASURED_BY), common)
    finally:
        for peer in peers.values():
            peer.close()


def _started_peers(
    shapes: Tree, dtype: str, common: Mapping[str, Any]
) -> dict[str, torch_peer.TorchPeer]:
    """Starts the torch peers, or returns a line for each where torch cannot be used."""
    device = torch_peer.device()
    if not device:
        for name in (*PEERS, torch_peer.COMPILED_TIMM_LAMB):
            gpu_lines.show_skipped(name, gpu_lines.NO_TORCH, common)
        return {}
    leaves = [x.shape for x in jax.tree.leaves(shapes)]
    return {name: torch_peer.TorchPeer.start(name, leaves, dtype, device) for name in PEERS}


def _compiled_steps(
    shapes: Tree, layers: rules.Rules, until: float, common: Mapping[str, Any]
) -> dict[str, harness.Step]:
    """Compiles the steps that fit into memory together, and prints the line of each program."""
    makers = {
        name: functools.partial(harness.Step, tx, harness.update(tx), shapes, [shapes])
        for name, tx in optimizers(layers).items()
    }
    compiled = {}
    for name, step in gpu_lines.made_together(makers, until):
        if step is None:
            gpu_lines.show_skipped(name, gpu_lines.NO_TIME, common)
        else:
            compiled[name] = step
            harness.show(name, {"measured": "program", **_program(name, step, shapes)}, common)
    held = harness.tree_bytes(shapes)
    if update.bandwidth_is_measured():
        held += update.ReadAndWrite.num_bytes
    return gpu_lines.fitting(
        {name: compiled[name] for name in makers if name in compiled}, held, common
    )


def _program(name: str, step: harness.Step, shapes: Tree) -> dict[str, Any]:
    """Returns the facts about a step that its compiled program states."""
    count, leaves = harness.parameters(shapes), jax.tree.leaves(shapes)
    kernels = hlo_kernels.kernels(step.text)
    largest = max(x.size for x in leaves)
    entry, state = step.parameter_bytes / count, step.state_bytes / count
    return {
        "kernels_per_leaf": len(kernels) / len(leaves),
        "kernels_on_largest_leaf": len(hlo_kernels.kernels_on(step.text, largest)),
        "array_bytes_per_parameter": sum(kernel.num_bytes for kernel in kernels) / count,
        "bytes_per_parameter": step.bytes_accessed / count,
        "fewest_bytes_per_parameter": update.fewest_bytes(name, entry, entry, state),
        "state_bytes_per_parameter": state,
        "temporaries_per_parameter": step.temporaries,
        "trace_and_lower_s": step.lower_seconds,
        "compile_s": step.compile_seconds,
    }


def _measure(
    steps: Mapping[str, harness.Step],
    peers: Mapping[str, torch_peer.TorchPeer],
    shapes: Tree,
    rounds: int,
    until: float,
    common: Mapping[str, Any],
) -> None:
    """Times all candidates and prints their lines."""
    gradients = harness.random_gradients(shapes)
    starts = {
        name: functools.partial(step.start, harness.random_parameters(gradients), [gradients])
        for name, step in steps.items()
    }
    list(gpu_lines.made_together(starts))  # compiles each optimizer's init
    candidates: dict[str, Callable[[], Tree]] = {**steps, **peers}
    if update.bandwidth_is_measured():
        candidates[update.READ_AND_WRITE] = update.ReadAndWrite()
    milliseconds = harness.interleaved(candidates, rounds, until=until)

    medians = {name: statistics.median(times) for name, times in milliseconds.items()}
    both_ways = 2 * update.ReadAndWrite.num_bytes
    bandwidth = both_ways / medians.get(update.READ_AND_WRITE, float("inf")) / 1e6
    entry = harness.tree_bytes(shapes) / common["parameters"]
    for name, times in milliseconds.items():
        measured = {
            "measured": "time",
            "rounds": len(times),
            **harness.spread(times),
        }
        if OURS in medians:
            measured["over_" + OURS] = medians[name] / medians[OURS]
        if name == update.READ_AND_WRITE:
            measured["gigabytes_per_second"] = bandwidth
        else:
            if name in peers:
                measured |= peers[name].facts
                state = measured.pop("state_bytes") / common["parameters"]
                measured["state_bytes_per_parameter"] = state
            else:
                state = steps[name].state_bytes / common["parameters"]
            fewest = update.fewest_bytes(name, entry, entry, state)
            measured["fewest_bytes_per_parameter"] = fewest
            per_second = fewest * common["parameters"] / medians[name] / 1e6
            measured["gigabytes_per_second"] = per_second
            if update.bandwidth_is_measured():
                measured["share_of_bandwidth"] = per_second / bandwidth
        harness.show(name, common, measured)


if __name__ == "__main__":
    main()
