"""Layer specs, which say what a layer of an array is, and rules that assign them to paths.

A trust ratio is one number for each layer. A layer is usually an array, but ``nn.scan`` stacks the
layers of a deep model in one array, and fused attention joins query, key and value in one kernel.
Rules from path patterns to specs describe such arrays::

    layers=[("encoder/layers/.*qkv", (stacked(0), split(-1, 3))), ("encoder/layers", stacked(0))]
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optim_zoo import ranges, rules
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.tree import Tree, leaf_paths, map_with_path


@dataclasses.dataclass(frozen=True)
class LayerAxis:
    """An axis along which an array holds several layers; made by `stacked` and `split`."""

    axis: int
    parts: int | None = None  # equal blocks along the axis; None: every index is a layer
    mesh_axis: str | None = None  # the mesh axis that the stacked layers are sharded over

    def count(self, shape: Sequence[int]) -> int:
        """Returns the number of layers along this axis of an array of ``shape``."""
        return shape[self.axis] if self.parts is None else self.parts


Layers = tuple[LayerAxis, ...]  # of one array, in the order of its axes; (): it is one layer


def stacked(axis: int, mesh_axis: str | None = None) -> LayerAxis:
    """Returns a spec by which every index along ``axis`` is a layer, as ``nn.scan`` stacks them.

    Args:
      axis: the axis, counted from the end if negative.
      mesh_axis: inside ``shard_map`` or ``pmap``, the mesh axis that the stacked layers are
        sharded over (pipeline parallelism). A device then holds whole layers, and their norms must
        not be summed over that axis. It must be passed because the type of an array does not say
        which of its axes is sharded.

    Raises:
      ArgumentTypeError: ``axis`` is not a whole number, or ``mesh_axis`` is not a name.
    """
    _check_axis("stacked", axis)
    if mesh_axis is not None and not isinstance(mesh_axis, str):
        raise ArgumentTypeError(
            "mesh_axis", "be the name of a mesh axis", mesh_axis, caller="stacked"
        )
    return LayerAxis(axis, mesh_axis=mesh_axis)


def split(axis: int, parts: int) -> LayerAxis:
    """Returns a spec by which ``parts`` equal blocks along ``axis`` are layers.

    An example is a fused query-key-value kernel. Inside ``shard_map`` or ``pmap``, an axis that is
    sharded over a mesh axis cannot be split, because a device sees only its own part of it. This is
    not detected.

    Raises:
      ArgumentTypeError: ``axis`` or ``parts`` is not a whole number.
      ArgumentValueError: ``parts`` is below 1.
    """
    _check_axis("split", axis)
    ranges.check_count("parts", parts, 1, caller="split")
    return LayerAxis(axis, parts)


def _check_axis(caller: str, axis: Any) -> None:
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise ArgumentTypeError("axis", "be a whole number", axis, caller=caller)


def from_scan(params: Tree, prefix: str, axis: int = 0) -> rules.Rules:
    """Returns the rule for a module whose layers ``nn.scan`` or ``nnx.scan`` stacked.

    ::

        tx = lamb(1e-3, layers=layers.from_scan(params, "encoder/layers"))

    Args:
      params: the parameters; arrays or ``jax.ShapeDtypeStruct``s.
      prefix: the path of the module, as in ``encoder/layers/attention/kernel``; no pattern.
      axis: the axis along which it is stacked: ``variable_axes`` of ``nn.scan``.

    Raises:
      ArgumentTypeError: ``axis`` is not a whole number.
      ArgumentValueError: there is no leaf under ``prefix``, a leaf there has no such axis, or the
        leaves have different sizes along it.
    """
    below = f"^{re.escape(prefix.strip('/'))}(/|$)"
    try:
        rules.check_matches("prefix", [below], params)
    except ArgumentValueError:
        near = ", ".join(rules.nearest(prefix, leaf_paths(params)))
        raise ArgumentValueError(
            "prefix",
            "be the path of a module in params",
            prefix,
            f"the nearest paths are {near}",
            sentence=f"from_scan: {{argument}} {prefix!r} matches no leaf; the nearest paths are "
            f"{near}",
        ) from None
    rule = [(below, stacked(axis))]
    counts: dict[str, int] = {}  # path -> layers

    def count(path: str, x: Any, spec: Layers) -> None:
        if spec:
            counts[path] = spec[0].count(jnp.shape(x))

    map_with_path(count, params, assign(rule, params))
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{path} ({layers})" for path, layers in counts.items())
        raise ArgumentValueError(
            "prefix",
            f"be the path of a module whose leaves have as many layers along axis {axis}",
            counts,
            sentence=f"from_scan: all leaves under {prefix} must have the same number of layers "
            f"along axis {axis}, got {shown}",
            related=["axis"],
        )
    return rule


def ranks(params: Tree, layer_rules: rules.Rules = ()) -> Tree:
    """Returns the number of axes that one layer of each leaf has: 1 for a stacked bias.

    This serves to make masks by rank. ``jax.tree.map(lambda rank: rank > 1, layers.ranks(params,
    rules))`` selects all matrices, and no stacked biases.
    """
    check_layer_rules(layer_rules)
    check_matches(layer_rules, params)
    return jax.tree.map(
        lambda x, spec: jnp.ndim(x) - sum(layer.parts is None for layer in spec),
        params,
        assign(layer_rules, params),
    )


def check_layer_rules(layer_rules: rules.Rules) -> None:
    """Raises unless ``layer_rules`` pairs path patterns with layer specs.

    Raises:
      ArgumentTypeError: they are not pairs, or the value of one is not a spec.
      ArgumentValueError: a pattern is not a regular expression.
    """
    rules.check_rules("layers", layer_rules)
    for pattern, spec in layer_rules:
        for item in spec if isinstance(spec, (tuple, list)) else (spec,):
            if not isinstance(item, LayerAxis):
                expected = "stacked(axis), split(axis, parts) or a tuple of them"
                raise ArgumentTypeError(
                    "layers",
                    f"give {expected} for every pattern",
                    item,
                    sentence=f"{{argument}}: the value of {pattern!r} must be {expected}, got "
                    f"{item!r}",
                )


def check_matches(layer_rules: rules.Rules, tree: Tree) -> None:
    """Raises `ArgumentValueError` where a rule matches no leaf of ``tree``."""
    rules.check_matches("layers", [pattern for pattern, _ in layer_rules], tree)


def assign(layer_rules: rules.Rules, tree: Tree) -> Tree:
    """Returns the `Layers` of every leaf of ``tree``.

    Raises:
      ArgumentValueError: a leaf has no such axis, the axis does not divide into the parts, or two
        specs name the same axis.
    """
    return map_with_path(lambda path, x: layers_of(layer_rules, path, x), tree)


def layers_of(layer_rules: rules.Rules, path: str, x: Any) -> Layers:
    """Returns the `Layers` of one array; see `assign`.

    Args:
      layer_rules: see `assign`.
      path: the path of the array.
      x: the array, or its ``jax.ShapeDtypeStruct``.

    Raises:
      ValueError: see `assign`.
    """
    spec: LayerAxis | Sequence[LayerAxis] = rules.first_match(layer_rules, path, default=())
    items = (spec,) if isinstance(spec, LayerAxis) else tuple(spec)
    shape = jnp.shape(x)
    resolved = []
    for item in items:
        if not -len(shape) <= item.axis < len(shape):
            raise ArgumentValueError(
                "layers",
                "name an axis of the leaf",
                item,
                sentence=f"{{argument}}: {path} has shape {shape} and no axis {item.axis}",
            )
        axis = item.axis % len(shape)
        if item.parts is not None and shape[axis] % item.parts:
            raise ArgumentValueError(
                "layers",
                "divide the axis into equal parts",
                item,
                sentence=f"{{argument}}: {path} has {shape[axis]} entries along axis {item.axis}, "
                f"which do not divide into {item.parts} parts",
            )
        resolved.append(dataclasses.replace(item, axis=axis))
    if len({item.axis for item in resolved}) < len(resolved):
        raise ArgumentValueError(
            "layers",
            "have one spec for an axis",
            items,
            sentence=f"{{argument}}: {path} has two specs for one axis: {items}",
        )
    return tuple(sorted(resolved, key=lambda item: item.axis))
