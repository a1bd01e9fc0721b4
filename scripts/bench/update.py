"""Measures one optimizer update, and its peers' on the same tree of parameters.

    python scripts/bench/update.py [--trees bert-base ...] [--groups lamb lars] [--rounds N]
        [--dtype float32] [--peers NAME ...] [--torch-threads N]

An update computes new parameters and state from given gradients; JAX's are jitted and donate their
arguments. A group is our optimizer and its peers, which take turns in one process. torch, timm and
pytorch_optimizer take part where they can be imported, in float32, by default on all cores.
Prints one JSON line per measurement, then one of ratios of medians:

    median_ms, quartiles_ms      of one update
    trace_and_lower_s, compile_s
    temporaries_per_parameter    bytes XLA allocates in a step / bytes of the parameters
    bytes_per_parameter          read and written in a step, by XLA's cost model
    state_bytes_per_parameter    optax's moments are bfloat16 where the parameters are, ours float32
    fewest_bytes_per_parameter   that a step with this state must read and write
    share_of_bandwidth           on a GPU: of the bandwidth of "read and write", which negates 1 GiB
                                 in place

"metrics out" is the same step that also returns ``optim_zoo.metrics.read(state)``. Needs the extra
``train`` for BERT's shapes. All of group lamb on BERT-base takes 14 GB of memory; where a group
does not fit, the script says so and exits with 2.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

import harness
import optim_zoo
import torch_steps
from harness import LAMB, LARS, LEARNING_RATE
from optim_zoo import rules
from optim_zoo.tree import Tree
from trees import TREES

ROUNDS = 30
GROUPS = ("lamb", "lars")
METRICS_OUT = "optim_zoo.lamb, metrics out"
READ_AND_WRITE = "read and write"


def optimizers(group: str, layers: rules.Rules = ()) -> dict[str, optax.GradientTransformation]:
    """Returns the members of a group that are optax transformations, ours first."""
    if group == "lars":
        return {
            "optim_zoo.lars": optim_zoo.lars(LEARNING_RATE, **LARS, layers=layers),
            "optax.lars": optax.lars(LEARNING_RATE, **LARS),
            "optax.adamw": optax.adamw(LEARNING_RATE, **LAMB),
        }
    ours = optim_zoo.lamb(LEARNING_RATE, **LAMB, layers=layers)
    return {
        "optim_zoo.lamb": ours,
        METRICS_OUT: ours,
        "optax.lamb": optax.lamb(LEARNING_RATE, **LAMB),
        "optim_zoo.adamw": optim_zoo.adamw(LEARNING_RATE, **LAMB),
        "optax.adamw": optax.adamw(LEARNING_RATE, **LAMB),
    }


class ReadAndWrite:
    """Negates an array in place: one pass that reads it and writes it."""

    num_bytes = 2**30  # far more than any cache

    def __init__(self, num_bytes: int | None = None) -> None:
        self._array = jnp.ones((num_bytes or self.num_bytes) // 4, jnp.float32)
        self._negate = jax.jit(jnp.negative, donate_argnums=0)

    def __call__(self) -> jax.Array:
        """Makes one pass."""
        self._array = self._negate(self._array)
        return self._array


def bandwidth_is_measured() -> bool:
    """Returns whether the time of `ReadAndWrite` bounds that of an optimizer.

    On a CPU it does not: an optimizer that runs in several threads can be faster.
    """
    return jax.default_backend() == "gpu"


def fewest_bytes(name: str, g: float, x: float, s: float) -> float:
    """Returns the fewest bytes per parameter that an update can read and write.

    In float32 LAMB moves 40 bytes, Adam 28 and LARS 28. A trust ratio is known only when the whole
    layer has been read, so that the update that it scales must be read a second time.

    Args:
      name: of the optimizer.
      g: bytes per parameter of the gradients.
      x: bytes per parameter of the parameters.
      s: bytes per parameter of the state.
    """
    match name.lower():
        case lamb if "lamb" in lamb:
            return (g + x + 2 * s) + (2 * x + s)
        case lars if "lars" in lars:
            return (g + x) + (g + 2 * x + 2 * s)
        case _:
            return g + 2 * x + 2 * s


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", nargs="+", choices=TREES, default=["bert-base"])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="default: all of the group")
    parser.add_argument("--torch-threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, for quartiles, got {arguments.rounds}")
    names = [
        name
        for group in arguments.groups
        for name in [*optimizers(group), *torch_steps.constructors(group, arguments.dtype)]
    ]
    for name in arguments.peers or ():
        if name not in names:
            parser.error(f"--peers: {name} is not one of those here: {'; '.join(names)}")
    for tree in arguments.trees:
        for group in arguments.groups:
            lack = measure(tree, group, arguments)
            if lack:
                parser.exit(2, f"group {group} on {tree} {lack}: name fewer --peers\n")


def measure(tree: str, group: str, arguments: argparse.Namespace) -> str:
    """Prints the lines of a group on a tree, and returns "".

    Where the group does not fit into memory, prints nothing and returns what it needs.
    """
    shapes, layers = TREES[tree]()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, arguments.dtype), shapes)
    ours = next(iter(optimizers(group)))

    def chosen(name: str) -> bool:
        return arguments.peers is None or name == ours or name in arguments.peers

    steps = {
        name: harness.Step(
            tx,
            harness.update(tx, optim_zoo.metrics.read if name == METRICS_OUT else None),
            shapes,
            [shapes],
        )
        for name, tx in optimizers(group, layers).items()
        if chosen(name)
    }
    peers = {
        name: make
        for name, make in torch_steps.constructors(group, arguments.dtype).items()
        if chosen(name)
    }
    size = harness.tree_bytes(shapes)
    held = size + sum(step.held_bytes for step in steps.values())
    temporary = max(step.temporary_bytes for step in steps.values())
    if bandwidth_is_measured():
        held += ReadAndWrite.num_bytes
    if peers:
        held += (1 + torch_steps.COPIES * len(peers)) * size
        temporary = max(temporary, torch_steps.TEMPORARIES * size)
    lack = harness.lacking(held + temporary)
    if lack:
        return lack

    gradients = harness.random_gradients(shapes)
    for step in steps.values():
        step.start(harness.random_parameters(gradients), [gradients])
    torch_members, versions = torch_steps.started(peers, shapes, arguments.torch_threads)
    members: dict[str, harness.Step | torch_steps.TorchStep] = {
        **steps,
        **torch_members,
    }
    candidates: dict[str, Callable[[], Tree]] = {**members}
    if bandwidth_is_measured():
        candidates[READ_AND_WRITE] = ReadAndWrite()
    milliseconds = harness.interleaved(candidates, arguments.rounds)

    count = harness.parameters(shapes)
    common = {
        "tree": tree,
        "group": group,
        "dtype": arguments.dtype,
        "parameters": count,
        "leaves": len(jax.tree.leaves(shapes)),
        "rounds": arguments.rounds,
        **harness.machine(),
        **versions,
    }
    medians = {name: statistics.median(times) for name, times in milliseconds.items()}
    for name, member in members.items():
        measured = harness.spread(milliseconds[name])
        if isinstance(member, harness.Step):
            measured |= {
                "trace_and_lower_s": member.lower_seconds,
                "compile_s": member.compile_seconds,
                "temporaries_per_parameter": member.temporaries,
                "bytes_per_parameter": member.bytes_accessed / count,
            }
        entry, state = size / count, member.state_bytes / count
        fewest = fewest_bytes(name, entry, entry, state)
        measured |= {
            "state_bytes_per_parameter": state,
            "fewest_bytes_per_parameter": fewest,
        }
        if bandwidth_is_measured():
            bytes_per_ms = 2 * ReadAndWrite.num_bytes / medians[READ_AND_WRITE]
            measured["share_of_bandwidth"] = fewest * count / medians[name] / bytes_per_ms
        harness.show(name, measured, common)
    if bandwidth_is_measured():
        measured = harness.spread(milliseconds[READ_AND_WRITE])
        measured["gigabytes_per_second"] = (
            2 * ReadAndWrite.num_bytes / medians.pop(READ_AND_WRITE) / 1e6
        )
        harness.show(READ_AND_WRITE, measured, common)
    ratios = {f"{name} / {ours}": x / medians[ours] for name, x in medians.items() if name != ours}
    harness.show("ratios of medians", ratios, common)
    return ""


if __name__ == "__main__":
    main()
