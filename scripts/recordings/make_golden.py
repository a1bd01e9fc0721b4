"""Runs the reference optimizers again on the recorded gradients, and compares or writes them.

    pip install -e '.[references]'
    python scripts/recordings/make_golden.py [CASE ...] [--compare | --out DIR]

Covers the recorded cases (`optim_zoo.recorded`) whose reference pip can install: torch, timm,
pytorch_optimizer, keras and optax. --compare, the default, prints one JSON line per case. Its
"largest_difference" is the largest |actual - expected| / (|expected| + atol / rtol) over the
parameters after every step and the recorded state; a case agrees if it is at most rtol. "version"
is the installed version where it differs from the recorded one. --out writes DIR/<case>.npz
instead, with the keys of the recorded file. The cases of a library that cannot be imported are
skipped with a message. timm imports torchvision, which must be the same build (CPU or CUDA) as
torch.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo import recorded, tree

Arrays = dict[str, np.ndarray]  # by the path of the leaf
# The parameters after a step, and a function from the name of a moment to its arrays.
Snapshot = tuple[Arrays, Callable[[str], Arrays]]


@dataclasses.dataclass(frozen=True)
class Library:
    """A library from which cases were recorded. Their references begin with its name."""

    module: str  # the module with its optimizers
    steps: Callable[[recorded.Case, recorded.Trajectory], Iterator[Snapshot]]

    def unusable(self) -> str | None:
        """Returns why the library cannot be imported, or None."""
        try:
            self.optimizers()
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another build
            return f"{self.module} cannot be imported ({error}): its cases are skipped"
        return None

    def optimizers(self) -> Any:
        """Returns the module with its optimizers."""
        os.environ["KERAS_BACKEND"] = "jax"  # read by keras when it is first imported
        return importlib.import_module(self.module)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "cases",
        nargs="*",
        metavar="CASE",
        help="the cases to run; by default, all that are covered",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--compare", action="store_true", help="with the recordings (default)")
    action.add_argument("--out", type=Path, metavar="DIR", help="write DIR/<case>.npz instead")
    arguments = parser.parse_args()
    cases = covered()
    unknown = set(arguments.cases) - {case.id for case in cases}
    if unknown:
        parser.error(f"not among the {len(cases)} cases covered: {', '.join(sorted(unknown))}")
    if arguments.cases:
        cases = [case for case in cases if case.id in arguments.cases]

    names = sorted({library(case) for case in cases})
    unusable = {name: LIBRARIES[name].unusable() for name in names}
    for reason in filter(None, unusable.values()):
        print(reason, file=sys.stderr)
    all_agree = True
    for case in cases:
        if unusable[library(case)]:
            continue
        regenerated = regenerate(case)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            file = arguments.out / f"{case.id}.npz"
            np.savez_compressed(file, allow_pickle=False, **arrays(regenerated))
        else:
            line = comparison(case, regenerated)
            all_agree &= line["agrees"]
            print(json.dumps(line), flush=True)
    sys.exit(not all_agree)


def covered() -> list[recorded.Case]:
    """Returns the recorded cases of `LIBRARIES`."""
    return [case for case in recorded.cases() if library(case) in LIBRARIES]


def library(case: recorded.Case) -> str:
    return case.reference.split()[0]


def regenerate(case: recorded.Case) -> recorded.Trajectory:
    """Returns the trajectory of ``case`` as the installed reference computes it."""
    trajectory = case.load()
    params = []
    extras: dict[str, dict[int, Arrays]] = {name: {} for name in case.extras}
    with jax.enable_x64(case.dtype == "float64"):
        for step, (leaves, state) in enumerate(LIBRARIES[library(case)].steps(case, trajectory)):
            params.append(leaves)
            if step in case.extra_steps:
                for name in case.extras:
                    extras[name][step] = state(name)
    return dataclasses.replace(trajectory, params=tuple(params), extras=extras)


def arrays(trajectory: recorded.Trajectory) -> Arrays:
    """Returns the arrays of the file of a recorded case, keyed as there."""
    series: dict[str, list[Any]] = {
        "grads/": list(trajectory.grads),
        "params/": list(trajectory.params),
        **{f"extra/{name}/": list(x.values()) for name, x in trajectory.extras.items()},
    }
    made = {f"params0/{path}": x for path, x in _by_path(trajectory.params0).items()}
    for prefix, trees in series.items():
        columns = [_by_path(x) for x in trees]
        made |= {prefix + path: np.stack([x[path] for x in columns]) for path in columns[0]}
    return made | {f"per_step/{name}": x for name, x in trajectory.per_step.items()}


def comparison(case: recorded.Case, regenerated: recorded.Trajectory) -> dict[str, Any]:
    """Compares ``regenerated`` with the recording, and returns the line to print."""
    actual, expected = arrays(regenerated), arrays(case.load())
    shapes = [{key: x.shape for key, x in found.items()} for found in (actual, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{case.id}: arrays {shapes[0]} where {shapes[1]} were recorded")
    differences = [
        np.max(np.abs(actual[key] - x) / (np.abs(x) + case.atol / case.rtol))
        for key, x in expected.items()
    ]
    largest = float(np.max(differences))  # NaN if there is one
    line = {
        "case": case.id,
        "reference": case.reference,
        "largest_difference": largest,
        "agrees": largest <= case.rtol,
    }
    name, recorded_version = case.reference.split()[:2]
    version = importlib.metadata.version(name)
    if version.partition("+")[0] != recorded_version:  # torch 2.13.0+cpu is torch 2.13.0
        line["version"] = f"{name} {version}"
    return line


def torch_steps(case: recorded.Case, trajectory: recorded.Trajectory) -> Iterator[Snapshot]:
    """Runs any ``torch.optim.Optimizer``: those of torch, timm and pytorch_optimizer."""
    import torch

    leaves = {
        path: torch.nn.Parameter(torch.tensor(x))
        for path, x in _by_path(trajectory.params0).items()
    }
    optimizer_of, arguments, excluded = _read(case.inner or vars(case))
    scheduled = {k: trajectory.per_step[v] for k, v in arguments.items() if isinstance(v, _Series)}
    arguments |= {name: float(series[0]) for name, series in scheduled.items()}
    groups: list[dict[str, Any]] = [
        {"params": [x for path, x in leaves.items() if not _matches(excluded, path)]}
    ]
    if excluded:
        without_decay = [x for path, x in leaves.items() if _matches(excluded, path)]
        groups.append({"params": without_decay, "weight_decay": 0.0})
    optimizer = inner = optimizer_of(groups, **arguments)
    if case.inner:
        wrapper_of, wrapper_arguments, _ = _read(vars(case))
        optimizer = wrapper_of(inner, **wrapper_arguments)

    for step, grads in enumerate(trajectory.grads):
        for group in inner.param_groups:
            group.update({name: float(series[step]) for name, series in scheduled.items()})
        for path, grad in _by_path(grads).items():
            dense = torch.tensor(grad)
            sparse = path in case.sparse_leaves
            leaves[path].grad = _present_rows(dense) if sparse else dense
        optimizer.step()
        yield (
            {path: x.detach().numpy().copy() for path, x in leaves.items()},
            lambda name: {path: inner.state[x][name].numpy().copy() for path, x in leaves.items()},
        )


def _present_rows(grad: Any) -> Any:
    """Returns a sparse COO tensor of the rows, along the first axis, that are not all zero."""
    import torch

    (rows,) = grad.reshape(len(grad), -1).any(dim=1).nonzero(as_tuple=True)
    return torch.sparse_coo_tensor(rows[None], grad[rows], grad.shape, check_invariants=True)


# The names of moments in Keras, where they differ from the recorded ones.
_KERAS_STATE = {
    "m": "momentum",
    "v": "velocity",
    "v_max": "velocity_hat",
    "avg_grad": "average_gradient",
    "accumulated_delta": "accumulated_delta_var",
}


def keras_steps(case: recorded.Case, trajectory: recorded.Trajectory) -> Iterator[Snapshot]:
    """Runs Keras on its JAX backend."""
    optimizer_of, arguments, excluded = _read(vars(case))
    import keras  # after _read, which chooses the backend

    keras.config.set_floatx(case.dtype)
    leaves = {
        path: keras.Variable(x, name=f"leaf_{i}")  # a name must not contain a slash
        for i, (path, x) in enumerate(_by_path(trajectory.params0).items())
    }

    def at_this_step(series: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: series[int(optimizer.iterations.value)]

    for name, value in arguments.items():
        if isinstance(value, _Series):
            arguments[name] = at_this_step(trajectory.per_step[value])
    optimizer = optimizer_of(**arguments)
    if excluded:
        excluded_leaves = [x for path, x in leaves.items() if _matches(excluded, path)]
        optimizer.exclude_from_weight_decay(var_list=excluded_leaves)
    optimizer.build(list(leaves.values()))
    variables = {x.name: x for x in optimizer.variables}

    def state(name: str) -> Arrays:
        name = _KERAS_STATE.get(name, name)
        return {path: np.array(variables[f"{x.name}_{name}"].value) for path, x in leaves.items()}

    for grads in trajectory.grads:
        by_path = _by_path(grads)
        optimizer.apply([jnp.asarray(by_path[path]) for path in leaves], list(leaves.values()))
        yield {path: np.array(x.value) for path, x in leaves.items()}, state


def optax_steps(case: recorded.Case, trajectory: recorded.Trajectory) -> Iterator[Snapshot]:
    """Runs optax, whose Lookahead keeps its slow weights with the parameters."""
    optimizer_of, arguments, excluded = _read(vars(case))
    if excluded:
        arguments["mask"] = lambda params: tree.map_with_path(
            lambda path, _: not _matches(excluded, path), params
        )
    params: Any = jax.tree.map(jnp.asarray, trajectory.params0)
    if case.inner:
        inner_of, inner_arguments, _ = _read(case.inner)
        tx = optimizer_of(inner_of(**inner_arguments), **arguments)
        params = optax.LookaheadParams.init_synced(params)
    else:
        tx = optimizer_of(**arguments)
    opt_state = tx.init(params)
    update = jax.jit(tx.update)

    def by_path(x: Any) -> Arrays:
        return {path: np.array(leaf) for path, leaf in tree.by_path(x).items()}

    def state(name: str) -> Arrays:
        return by_path(params.slow if name == "slow" else optax.tree.get(opt_state, name))

    for grads in trajectory.grads:
        updates, opt_state = update(jax.tree.map(jnp.asarray, grads), opt_state, params)
        params = optax.apply_updates(params, updates)
        yield by_path(params.fast if case.inner else params), state


def _by_path(nested: recorded.Tree, prefix: str = "") -> Arrays:
    """Returns the leaves, keyed by path, in their recorded order.

    The reference sums over them in this order; ``optim_zoo.tree.by_path`` would sort them.
    """
    made: Arrays = {}
    for name, x in nested.items():
        made |= _by_path(x, f"{prefix}{name}/") if isinstance(x, dict) else {prefix + name: x}
    return made


class _Series(str):
    """The name of a series with one number per step."""


def _read(entry: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any], list[str]]:
    """Returns the optimizer's class, its arguments, and the patterns of undecayed leaves."""
    *_, name, optimizer = entry["constructor"].split(".")  # optim_zoo.ports.timm.Lamb
    module = LIBRARIES["optax" if name == "optim_zoo" else name].optimizers()
    arguments = dict(entry["arguments"])
    excluded = arguments.pop("exclude_from_weight_decay", [])
    for key, value in arguments.items():
        if isinstance(value, str) and value.startswith("per_step/"):
            arguments[key] = _Series(value.removeprefix("per_step/"))
    return getattr(module, optimizer), arguments, excluded


def _matches(patterns: list[str], path: str) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)


LIBRARIES = {
    "torch": Library("torch.optim", torch_steps),
    "timm": Library("timm.optim", torch_steps),
    "pytorch_optimizer": Library("pytorch_optimizer", torch_steps),
    "keras": Library("keras.optimizers", keras_steps),
    "optax": Library("optax", optax_steps),
}

if __name__ == "__main__":
    main()
