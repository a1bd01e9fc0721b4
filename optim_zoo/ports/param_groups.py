"""Builds the port of a torch optimizer from the parameter groups in its ``state_dict``."""

import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optax

from optim_zoo import ranges
from optim_zoo.errors import ArgumentValueError
from optim_zoo.transforms import clip_by_global_norm
from optim_zoo.tree import map_with_path

StateDict = Mapping[str, Any]
Names = Mapping[str, str | tuple[str, Sequence[int]]]

_LIBRARIES = ("torch", "timm", "pytorch_optimizer", "apex")
# Arguments that choose a kernel and do not change the formula.
_KERNELS = frozenset({"foreach", "fused", "capturable", "differentiable"})


def from_param_groups(
    source: str, state: StateDict, *, names: Names
) -> optax.GradientTransformation:
    """Returns the port that computes what the optimizer of a ``state_dict`` computes.

    Its arguments are those of the parameter groups. Groups that differ only in whether their
    weight decay is 0 become one port, with the undecayed parameters in its
    ``exclude_from_weight_decay``. Groups that differ in more, such as in their learning rates,
    become an ``optax.partition`` of one port for each; where the optimizer clips to the global
    norm, one clipping of all gradients precedes it.

    Arguments that are not in the parameter groups have the source's defaults: ``adam_w_mode`` and
    ``use_nvlamb`` of Apex, and ``maximize``, ``use_gc``, ``degenerated_to_sgd``,
    ``n_sma_threshold`` and ``pre_norm`` of pytorch_optimizer. The arguments that choose a kernel
    (``foreach``, ``fused``, ``capturable``, ``differentiable``) are ignored. A schedule is not in a
    ``state_dict``: every learning rate is the constant of its group.

    Args:
      source: the name of a port of torch, timm, pytorch_optimizer or Apex, such as
        ``"timm.Lamb"``. Wrappers, such as ``timm.Lookahead``, have no name here, because their
        inner optimizer is not in the parameter groups; build them from their ports.
      state: ``optimizer.state_dict()``; only its ``"param_groups"`` are read.
      names: see `from_state_dict`.

    Raises:
      ArgumentValueError: there is no such port, or the groups differ in ``max_grad_norm``.

    Warns:
      UserWarning: the groups differ in more than a weight decay of 0; the arguments in which they
        differ are named.
    """
    port = _port(source)
    takes = set(inspect.signature(port).parameters) - _KERNELS
    arguments = [{k: v for k, v in g.items() if k in takes} for g in state["param_groups"]]
    check_names(names, state)
    paths = list(target_paths(names))
    members = [[paths[i] for i in group["params"]] for group in state["param_groups"]]
    without_decay = [{k: v for k, v in a.items() if k != "weight_decay"} for a in arguments]
    decays = sorted({a.get("weight_decay", 0) for a in arguments})
    alike = all(other == without_decay[0] for other in without_decay)
    if alike and len(decays) == 1:
        return port(**arguments[0])
    if alike and len(decays) == 2 and decays[0] == 0 and "exclude_from_weight_decay" in takes:
        undecayed = [
            path
            for group, inside in zip(arguments, members, strict=True)
            if not group["weight_decay"]
            for path in inside
        ]
        exclude = [f"^{re.escape(path)}$" for path in undecayed]
        decay = {"weight_decay": decays[1], "exclude_from_weight_decay": exclude}
        return port(**without_decay[0], **decay)
    return _partition(source, port, arguments, members)


def check_names(names: Names, state: StateDict) -> None:
    """Raises `ArgumentValueError` unless there is one name for each parameter of the groups."""
    count = sum(len(group["params"]) for group in state["param_groups"])
    if len(names) != count:
        expected = f"list the {count} parameters of the state_dict"
        raise ArgumentValueError("names", expected, len(names))


def target_paths(names: Names) -> Iterator[str]:
    """Yields the path in ``params`` of every torch parameter, in the order of their indices."""
    return (target if isinstance(target, str) else target[0] for target in names.values())


def _port(source: str) -> Callable[..., optax.GradientTransformation]:
    library, _, name = source.removeprefix("ports.").partition(".")
    ranges.check_choice("library with a state_dict", library, _LIBRARIES, argument="source")
    module = importlib.import_module(f"optim_zoo.ports.{library}")
    ports = [key for key, value in vars(module).items() if _is_port(module, key, value)]
    ranges.check_choice(f"port of {library}", name, ports, argument="source")
    port: Callable[..., optax.GradientTransformation] = getattr(module, name)
    return port


def _is_port(module: Any, name: str, value: Any) -> bool:
    own = getattr(value, "__module__", None) == module.__name__
    if not own or not inspect.isfunction(value) or not name[0].isupper():
        return False
    return not {"optimizer", "base_optimizer"} & set(inspect.signature(value).parameters)


def _partition(
    source: str,
    port: Callable[..., optax.GradientTransformation],
    arguments: Sequence[Mapping[str, Any]],
    members: Sequence[Sequence[str]],
) -> optax.GradientTransformation:
    """Returns one port for each group, after the clipping that all groups share."""
    everything = sorted(set().union(*arguments))
    differing = {
        name: [group.get(name) for group in arguments]
        for name in everything
        if any(group.get(name) != arguments[0].get(name) for group in arguments)
    }
    if "max_grad_norm" in differing:
        advice = "build one port for each group, and put them together with optax.partition"
        raise ArgumentValueError(
            "state",
            "have one max_grad_norm in all parameter groups",
            differing["max_grad_norm"],
            advice,
            sentence=f"{source}: all parameter groups must have one max_grad_norm, got "
            f"{differing['max_grad_norm']}: {advice}",
        )
    assumed = (
        f"{source}: the parameter groups differ in "
        + ", ".join(f"{name} ({', '.join(map(str, x))})" for name, x in differing.items())
        + "; each becomes one port of an optax.partition, with a constant learning rate"
    )
    warnings.warn(assumed, stacklevel=3)
    chosen = [dict(group) for group in arguments]
    max_norm = arguments[0].get("max_grad_norm")
    clip = None
    if max_norm and source.endswith(("timm.Lamb", "apex.FusedLAMB")):
        # These clip to the norm over the gradients of all groups.
        clip = clip_by_global_norm(max_norm)
        chosen = [{**group, "max_grad_norm": None} for group in chosen]
    labels = {path: str(i) for i, inside in enumerate(members) for path in inside}
    partition = optax.partition(
        {str(i): port(**group) for i, group in enumerate(chosen)},
        lambda params: map_with_path(lambda path, _: labels[path], params),
    )
    return partition if clip is None else optax.chain(clip, partition)
