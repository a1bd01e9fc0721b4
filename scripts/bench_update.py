"""What one optimizer update costs, beside its peers on the same tree of parameters.

    python scripts/bench_update.py [--trees bert-base ...] [--groups lamb lars] [--rounds N]
        [--dtype float32] [--peers NAME ...] [--torch-threads N]

An update is what an optimizer makes of given gradients, added to the parameters; JAX's are jitted
and donate. A group is ours and its peers, taking turns in one process. torch, timm and
pytorch_optimizer take part where they can be imported, in float32, on all cores unless told.
Prints one JSON line a measurement, then one of ratios of medians:

    median_ms, quartiles_ms      of one update
    trace_and_lower_s, compile_s
    temporaries_per_parameter    bytes XLA allocates in a step / bytes of the parameters
    bytes_per_parameter          read and written in a step, by XLA's cost model
    state_bytes_per_parameter    optax's moments are bfloat16 where the parameters are, ours not
    fewest_bytes_per_parameter   that a step with this state must read and write
    share_of_bandwidth           on a GPU: of "read and write", which negates 1 GiB in place

"metrics out" is the same step that also returns ``optim_zoo.metrics.read(state)``. Needs the extra
``train`` for BERT's shapes. All of group lamb on BERT-base takes 14 GB of memory; where a group
does not fit, the script says so and exits with 2.
"""

import argparse
import functools
import importlib.util
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import bench_common
import jax
import jax.numpy as jnp
import optax
from bench_common import LEARNING_RATE

import optim_zoo
from optim_zoo import rules
from optim_zoo.train import bert, config
from optim_zoo.tree import Tree

ROUNDS = 30
VOCABULARY_SIZE = 30_522  # of BERT's own vocabulary
GROUPS = ("lamb", "lars")
METRICS_OUT = "optim_zoo.lamb, metrics out"
READ_AND_WRITE = "read and write"
LAMB: dict[str, Any] = {"weight_decay": 0.01}
LARS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4}

BERT_TINY = config.Model(scan_layers=False)
BERT_BASE = config.Model(
    num_layers=12, hidden_size=768, num_heads=12, intermediate_size=3072, scan_layers=False
)
BERT_BASE_SCAN = config.Model(
    num_layers=12, hidden_size=768, num_heads=12, intermediate_size=3072, scan_layers=True
)
BERT_LARGE = config.Model(
    num_layers=24, hidden_size=1024, num_heads=16, intermediate_size=4096, scan_layers=False
)


def bert_tree(model: config.Model) -> tuple[Tree, rules.Rules]:
    """The shapes of BERT's parameters, and what a layer is in them."""
    ids = jax.ShapeDtypeStruct((1,), jnp.int32)
    init = functools.partial(bert.Bert(model, VOCABULARY_SIZE).init, deterministic=True)
    variables: Any = jax.eval_shape(init, jax.random.key(0), ids, ids, ids)
    return variables["params"], bert.layer_rules(model)


TREES: Mapping[str, Callable[[], tuple[Tree, rules.Rules]]] = {
    "bert-tiny": lambda: bert_tree(BERT_TINY),
    "bert-base": lambda: bert_tree(BERT_BASE),
    "bert-base-scan": lambda: bert_tree(BERT_BASE_SCAN),
    "bert-large": lambda: bert_tree(BERT_LARGE),
    "small-leaves": lambda: (bench_common.square_leaves(20_000_000, 2000), ()),
}


def optimizers(group: str, layers: rules.Rules = ()) -> dict[str, optax.GradientTransformation]:
    """The members of a group that are optax transformations, ours first."""
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


TorchOptimizer = Callable[[list[Any]], Any]  # of the parameters


def torch_optimizers(group: str, dtype: str) -> dict[str, TorchOptimizer]:
    """The members of a group that are torch optimizers, where they can be measured."""

    def adamw(params: list[Any]) -> Any:
        import torch

        return torch.optim.AdamW(params, LEARNING_RATE, fused=True, **LAMB)

    def timm_lamb(params: list[Any]) -> Any:
        import timm.optim

        # Without clipping by the global norm, which the others do not do either.
        return timm.optim.Lamb(params, LEARNING_RATE, max_grad_norm=None, **LAMB)

    def timm_lars(params: list[Any]) -> Any:
        import timm.optim

        return timm.optim.Lars(params, LEARNING_RATE, **LARS)

    def pytorch_optimizer_lamb(params: list[Any]) -> Any:
        import pytorch_optimizer

        return pytorch_optimizer.Lamb(params, LEARNING_RATE, **LAMB)

    if dtype != "float32" or not importlib.util.find_spec("torch") or _torch_device() is None:
        return {}
    members: dict[str, TorchOptimizer] = (
        {"timm.optim.Lars": timm_lars}
        if group == "lars"
        else {
            "torch.optim.AdamW(fused=True)": adamw,
            "timm.optim.Lamb": timm_lamb,
            "pytorch_optimizer.Lamb": pytorch_optimizer_lamb,
        }
    )
    return {name: x for name, x in members.items() if importlib.util.find_spec(name.split(".")[0])}


def _torch_device() -> str | None:
    """Where torch has to work to be a peer; None where it cannot."""
    import torch

    if jax.default_backend() != "gpu":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


TORCH_COPIES = 3  # parameters and state of a torch optimizer, in multiples of the parameters
TORCH_TEMPORARIES = 3  # of peers that go through all leaves at once; not measured


class TorchStep:
    """A torch optimizer on parameters of its own."""

    def __init__(self, make: TorchOptimizer, gradients: Sequence[Any]) -> None:
        import torch

        params = []
        for g in gradients:
            x = torch.nn.Parameter(bench_common.PARAMETERS_OVER_GRADIENTS * g)
            x.grad = g
            params.append(x)
        self._optimizer = make(params)
        self._step = self._optimizer.step
        self._wait = torch.cuda.synchronize if gradients[0].is_cuda else lambda: None

    def __call__(self) -> "TorchStep":
        """Starts one step. On a GPU it may still run when this returns."""
        self._step()
        return self

    def compile(self) -> None:
        """Makes the state by one eager step, then compiles all further steps as one program."""
        import torch

        self._optimizer.step()
        self._step = torch.compile(self._optimizer.step)

    def block_until_ready(self) -> None:
        """Waits until all started steps are done."""
        self._wait()

    @property
    def state_bytes(self) -> int:
        """Bytes of the state, after the first step."""
        tensors = [x for state in self._optimizer.state.values() for x in state.values()]
        return sum(x.nbytes for x in tensors)


class ReadAndWrite:
    """One pass that reads an array and writes it in place."""

    num_bytes = 2**30  # far more than any cache

    def __init__(self, num_bytes: int | None = None) -> None:
        self._array = jnp.ones((num_bytes or self.num_bytes) // 4, jnp.float32)
        self._negate = jax.jit(jnp.negative, donate_argnums=0)

    def __call__(self) -> jax.Array:
        """The pass."""
        self._array = self._negate(self._array)
        return self._array


def bandwidth_is_measured() -> bool:
    """Whether `ReadAndWrite` is a bound: an optimizer in several threads of a CPU can be faster."""
    return jax.default_backend() == "gpu"


def fewest_bytes(name: str, g: float, x: float, s: float) -> float:
    """The fewest bytes an entry can cost, given those of its gradient, itself and its state.

    In float32 LAMB 40, Adam 28, LARS 28: a trust ratio is known only when all of a layer has been
    read, so that what it scales is read a second time.
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
        for name in [*optimizers(group), *torch_optimizers(group, arguments.dtype)]
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
    """Prints the lines of a group on a tree. Where it does not fit, says what it needs instead."""
    shapes, layers = TREES[tree]()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, arguments.dtype), shapes)
    ours = next(iter(optimizers(group)))

    def chosen(name: str) -> bool:
        return arguments.peers is None or name == ours or name in arguments.peers

    steps = {
        name: bench_common.Step(
            tx,
            bench_common.update(tx, optim_zoo.metrics.read if name == METRICS_OUT else None),
            shapes,
            [shapes],
        )
        for name, tx in optimizers(group, layers).items()
        if chosen(name)
    }
    peers = {
        name: make
        for name, make in torch_optimizers(group, arguments.dtype).items()
        if chosen(name)
    }
    size = bench_common.tree_bytes(shapes)
    held = size + sum(step.held_bytes for step in steps.values())
    temporary = max(step.temporary_bytes for step in steps.values())
    if bandwidth_is_measured():
        held += ReadAndWrite.num_bytes
    if peers:
        held += (1 + TORCH_COPIES * len(peers)) * size
        temporary = max(temporary, TORCH_TEMPORARIES * size)
    lack = bench_common.lacking(held + temporary)
    if lack:
        return lack

    gradients = bench_common.random_gradients(shapes)
    for step in steps.values():
        step.start(bench_common.parameters_beside(gradients), [gradients])
    torch_steps, versions = _torch_steps(peers, shapes, arguments.torch_threads)
    members: dict[str, bench_common.Step | TorchStep] = {**steps, **torch_steps}
    candidates: dict[str, Callable[[], Tree]] = {**members}
    if bandwidth_is_measured():
        candidates[READ_AND_WRITE] = ReadAndWrite()
    milliseconds = bench_common.interleaved(candidates, arguments.rounds)

    count = bench_common.parameters(shapes)
    common = {
        "tree": tree,
        "group": group,
        "dtype": arguments.dtype,
        "parameters": count,
        "leaves": len(jax.tree.leaves(shapes)),
        "rounds": arguments.rounds,
        **bench_common.machine(),
        **versions,
    }
    medians = {name: statistics.median(times) for name, times in milliseconds.items()}
    for name, member in members.items():
        measured = bench_common.spread(milliseconds[name])
        if isinstance(member, bench_common.Step):
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
        bench_common.show(name, measured, common)
    if bandwidth_is_measured():
        measured = bench_common.spread(milliseconds[READ_AND_WRITE])
        measured["gigabytes_per_second"] = (
            2 * ReadAndWrite.num_bytes / medians.pop(READ_AND_WRITE) / 1e6
        )
        bench_common.show(READ_AND_WRITE, measured, common)
    ratios = {f"{name} / {ours}": x / medians[ours] for name, x in medians.items() if name != ours}
    bench_common.show("ratios of medians", ratios, common)
    return ""


def _torch_steps(
    peers: Mapping[str, TorchOptimizer], shapes: Tree, threads: int
) -> tuple[dict[str, TorchStep], dict[str, Any]]:
    """The torch members of a group, and what is to be said of torch beside their times."""
    if not peers:
        return {}, {}
    import torch

    torch.set_num_threads(threads)
    generator = torch.Generator(_torch_device()).manual_seed(0)
    gradients = [
        1e-3 * torch.randn(x.shape, generator=generator, device=generator.device)
        for x in jax.tree.leaves(shapes)
    ]
    steps = {name: TorchStep(make, gradients) for name, make in peers.items()}
    return steps, {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}


if __name__ == "__main__":
    main()
