"""Carrying a running torch job over: its ``state_dict`` as the state of a port."""

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo import ranges
from optim_zoo.errors import ArgumentValueError
from optim_zoo.ports._pieces import DecayState, ScaleByAdamEpsilonHatState
from optim_zoo.transforms import (
    ScaleByAdadeltaState,
    ScaleByAdagradState,
    ScaleByAdamState,
    ScaleByAmsgradState,
    ScaleByLazyAdamState,
    ScaleByLearningRateState,
    ScaleByNadamState,
    ScaleByRadamState,
    ScaleByRmsState,
    ScaleByScheduledNadamState,
    ScaleByUncorrectedAdamState,
    ScaleByUncorrectedAmsgradState,
    TraceMomentumEmaState,
    TraceMomentumState,
    TraceNesterovMomentumState,
)
from optim_zoo.tree import Tree, leaf_paths, map_with_path

StateDict = Mapping[str, Any]
Names = Mapping[str, str | tuple[str, Sequence[int]]]

_LIBRARIES = ("torch", "timm", "pytorch_optimizer")

# What the fields of our states are called in torch, timm and pytorch_optimizer.
_MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq"}
_LARGEST_MOMENTS = {**_MOMENTS, "nu_max": "max_exp_avg_sq"}
_MOMENTUM = {"momentum": "momentum_buffer"}
_FIELDS: dict[type, dict[str, str]] = {
    ScaleByAdamState: _MOMENTS,
    ScaleByAdamEpsilonHatState: _MOMENTS,
    ScaleByUncorrectedAdamState: _MOMENTS,
    ScaleByLazyAdamState: _MOMENTS,
    ScaleByRadamState: _MOMENTS,
    ScaleByNadamState: _MOMENTS,
    ScaleByScheduledNadamState: _MOMENTS,
    ScaleByAmsgradState: _LARGEST_MOMENTS,
    ScaleByUncorrectedAmsgradState: _LARGEST_MOMENTS,
    TraceMomentumState: _MOMENTUM,
    TraceNesterovMomentumState: _MOMENTUM,
    TraceMomentumEmaState: _MOMENTUM,
    ScaleByRmsState: {"nu": "square_avg", "mu": "grad_avg"},
    ScaleByAdagradState: {"sum_of_squares": "sum"},
    ScaleByAdadeltaState: {"e_g": "square_avg", "e_x": "acc_delta"},
    ScaleByLearningRateState: {},
    DecayState: {},
}


def from_state_dict(
    source: str | optax.GradientTransformation,
    state: StateDict,
    params: Tree,
    *,
    names: Names,
    step: int | None = None,
) -> Any:
    """The state of a port at the point where a torch run stands, so that JAX goes on from there.

    ::

        names = {"hidden.weight": ("hidden/kernel", (1, 0)), "hidden.bias": "hidden/bias"}
        tx = ports.from_param_groups("torch.AdamW", state_dict, names=names)
        state = ports.from_state_dict(tx, state_dict, params, names=names)

    Args:
      source: the port, made with the arguments the torch run had; or its name, such as
        ``"torch.AdamW"``, for the one that `from_param_groups` makes.
      state: ``optimizer.state_dict()``, with NumPy arrays in place of tensors: ``"state"`` by the
        index of the parameter, and ``"param_groups"``.
      params: the parameters, carried over already.
      names: the torch parameters in the order of their indices, which is that of the groups they
        were given in; of each its path in ``params``, or (path, axes) where it has to be
        transposed, axes as for ``np.transpose``. A square kernel does not show that it has to.
      step: the steps made, where the state does not hold their number (SGD).

    Returns:
      The state of the port. What only shows what the last step did, such as trust ratios, is as
      after ``init``.

    Raises:
      ArgumentValueError: a parameter or a field is missing, or a shape does not fit; it is named.
      NotImplementedError: the port keeps state that no torch state is known for.
    """
    if isinstance(source, str):
        source = from_param_groups(source, state, names=names)
    fresh = source.init(params)
    moments = _by_path(state, params, names)
    count = _steps_made(state, step)
    learning_rate = state["param_groups"][0]["lr"]

    def carried(piece: Any) -> Any:
        fields = _FIELDS.get(type(piece))
        if fields is None:
            return piece
        new = {
            ours: _moment(theirs, moments, getattr(piece, ours))
            for ours, theirs in fields.items()
            if getattr(piece, ours) is not None
        }
        for field in {"count", "step"}.intersection(piece._fields):
            new[field] = jnp.asarray(count, getattr(piece, field).dtype)
        if isinstance(piece, ScaleByLearningRateState):
            new["rate"] = jnp.asarray(learning_rate, piece.rate.dtype)
        if isinstance(piece, ScaleByScheduledNadamState):
            product = next(iter(moments.values()))["mu_product"]
            new["product"] = jnp.asarray(product, piece.product.dtype)
        if isinstance(piece, DecayState):
            new["inner"] = _map_pieces(carried, piece.inner)
        return piece._replace(**new)

    return _map_pieces(carried, fresh)


def from_param_groups(
    source: str, state: StateDict, *, names: Names
) -> optax.GradientTransformation:
    """The port that computes what the optimizer of a ``state_dict`` does.

    Its arguments are those of the parameter groups; parameters in a group of weight decay 0 are
    its ``exclude_from_weight_decay``. Switches that choose a kernel (``foreach``, ``fused``,
    ``capturable``, ``differentiable``) are left out.

    Args:
      source: the name of a port of torch, timm or pytorch_optimizer, such as ``"timm.Lamb"``.
      state, names: see `from_state_dict`.

    Raises:
      ArgumentValueError: there is no such port, or the groups differ in more than their weight
        decay.
    """
    library, _, name = source.removeprefix("ports.").partition(".")
    ranges.check_choice("library with a state_dict", library, _LIBRARIES, argument="source")
    module = importlib.import_module(f"optim_zoo.ports.{library}")
    ports = [key for key, value in vars(module).items() if _is_port(module, key, value)]
    ranges.check_choice(f"port of {library}", name, ports, argument="source")
    port = getattr(module, name)
    groups = state["param_groups"]
    takes = set(inspect.signature(port).parameters)
    takes -= {"foreach", "fused", "capturable", "differentiable"}
    arguments = [{k: v for k, v in g.items() if k in takes - {"weight_decay"}} for g in groups]
    decays = sorted({group.get("weight_decay", 0) for group in groups})
    if any(other != arguments[0] for other in arguments) or len([d for d in decays if d]) > 1:
        expected = "differ in nothing but a weight decay of 0"
        differing = [{k: v for k, v in g.items() if k != "params"} for g in groups]
        advice = "put one port a group together with optax.partition"
        raise ArgumentValueError(
            "state",
            f"have parameter groups that {expected}",
            differing,
            advice,
            sentence=f"{source}: the parameter groups must {expected}, got {differing}: {advice}",
        )
    chosen = dict(arguments[0])
    if "weight_decay" in takes:
        chosen["weight_decay"] = decays[-1]
    if decays[-1] and decays[0] == 0 and "exclude_from_weight_decay" in takes:
        paths = list(_paths(names))
        undecayed = [i for g in groups if not g["weight_decay"] for i in g["params"]]
        chosen["exclude_from_weight_decay"] = [f"^{re.escape(paths[i])}$" for i in undecayed]
    return port(**chosen)


def _is_port(module: Any, name: str, value: Any) -> bool:
    own = getattr(value, "__module__", None) == module.__name__
    return own and inspect.isfunction(value) and name[0].isupper()


def _paths(names: Names) -> Iterator[str]:
    return (target if isinstance(target, str) else target[0] for target in names.values())


def _by_path(state: StateDict, params: Tree, names: Names) -> dict[str, dict[str, np.ndarray]]:
    """The state of every parameter by its path in ``params``, transposed as it is there."""
    shapes = {path: jnp.shape(x) for path, x in zip(leaf_paths(params), jax.tree.leaves(params),
                                                     strict=True)}  # fmt: skip
    indices = [index for group in state["param_groups"] for index in group["params"]]
    if len(names) != len(indices):
        expected = f"list the {len(indices)} parameters of the state_dict"
        raise ArgumentValueError("names", expected, len(names))
    apart = sorted(set(_paths(names)) ^ set(shapes))
    if apart:
        raise ArgumentValueError(
            "names",
            "have the paths of params",
            apart,
            sentence=f"{{argument}} and params must have the same paths; they differ at {apart}",
            related=["params"],
        )
    moments = {}
    for index, (name, target) in zip(sorted(indices), names.items(), strict=True):
        path, axes = (target, None) if isinstance(target, str) else target
        moments[path] = {
            field: _fitted(name, field, path, np.asarray(value), axes, shapes[path])
            for field, value in state["state"].get(index, {}).items()
            if value is not None
        }
    return moments


def _fitted(
    name: str,
    field: str,
    path: str,
    value: np.ndarray,
    axes: Sequence[int] | None,
    shape: tuple[int, ...],
) -> np.ndarray:
    if field in ("step", "mu_product"):
        return value.reshape(())
    fitted = value if axes is None else np.transpose(value, axes)
    if fitted.shape != shape:
        advice = f'give ("{path}", axes) to transpose it' if axes is None else ""
        raise ArgumentValueError(
            "names",
            f"give {path} the shape {shape}",
            fitted.shape,
            advice,
            sentence=f"{field} of {name} has shape {fitted.shape}, {path} has {shape}"
            + (f"; {advice}" if advice else ""),
        )
    return fitted


def _moment(field: str, moments: Mapping[str, Mapping[str, np.ndarray]], like: Tree) -> Tree:
    def at(path: str, x: jax.Array) -> jax.Array:
        if field not in moments[path]:
            has = sorted(moments[path])
            advice = "has the run made a step, and is it this optimizer's?"
            raise ArgumentValueError(
                "state",
                f"hold {field} for every parameter",
                has,
                advice,
                sentence=f"the state_dict has no {field} for {path}, only {has}: {advice}",
            )
        return jnp.asarray(moments[path][field], x.dtype)

    return map_with_path(at, like)


def _steps_made(state: StateDict, step: int | None) -> int:
    if step is not None:
        ranges.check_count("step", step, 0)
        return step
    of_parameters = [float(s["step"]) for s in state["state"].values() if "step" in s]
    counts = set(of_parameters or [float(g["step"]) for g in state["param_groups"] if "step" in g])
    if len(counts) != 1:
        found = f"it holds {sorted(counts)}" if counts else "it does not hold it"
        expected = "say how many steps were made, the same for all parameters"
        raise ArgumentValueError(
            "state",
            expected,
            sorted(counts),
            "give step=...",
            sentence=f"the state_dict must {expected}, but {found}: give step=...",
            related=["step"],
        )
    return int(counts.pop())


def _map_pieces(function: Any, state: Any) -> Any:
    """``function`` at every state of a piece, inside chains and named tuples of other wrappers."""
    is_piece = lambda node: type(node) in _FIELDS  # noqa: E731
    return jax.tree.map(
        lambda node: function(node) if is_piece(node) else node, state, is_leaf=is_piece
    )
