"""What one layer is inside an array, and norms per layer.

A trust ratio is one number a layer. Mostly a layer is an array, but ``nn.scan`` stacks the layers
of a deep model into one array and fused attention joins query, key and value in one kernel. Rules
say so::

    layers=[("encoder/layers/.*qkv", (stacked(0), split(-1, 3))), ("encoder/layers", stacked(0))]

Inside a mapped context (``shard_map``, ``pmap``) a device holds a block of an array, and the
squared norms are summed over the mesh axes the array is cut over. Under ``jit`` arrays are global
and nothing of this is needed.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from optim_zoo import ranges, rows, rules
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.tree import Tree, leaf_paths, map_with_path, varying_axes, wide

AxisName = str | Sequence[str] | rules.Rules | None


@dataclasses.dataclass(frozen=True)
class LayerAxis:
    """An axis of an array along which layers lie; made by `stacked` and `split`."""

    axis: int
    parts: int | None = None  # equal blocks along the axis; None: every index is a layer
    mesh_axis: str | None = None  # the mesh axis the stacked layers are spread over

    def count(self, shape: Sequence[int]) -> int:
        """How many layers lie along the axis of an array of ``shape``."""
        return shape[self.axis] if self.parts is None else self.parts


Layers = tuple[LayerAxis, ...]  # of one array, in the order of its axes; (): it is one layer


def stacked(axis: int, mesh_axis: str | None = None) -> LayerAxis:
    """Every index along ``axis`` is a layer, as ``nn.scan`` stacks them.

    Args:
      axis: counted from the end where negative.
      mesh_axis: inside ``shard_map`` or ``pmap``, the mesh axis the stacked layers are spread
        over (pipeline parallelism): a device then holds whole layers, and their norms must not be
        summed over that axis. An array's type does not say which dimension is cut, so this has
        to be told.

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
    """``parts`` equal blocks along ``axis`` are layers, as in a fused query-key-value kernel.

    Inside ``shard_map`` or ``pmap`` an axis that is itself cut over a mesh axis cannot be split:
    a device sees its own block only, and this is not detected.

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
    """The rule for a module whose layers ``nn.scan`` or ``nnx.scan`` stacked.

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
    """The number of axes that one layer has, of every leaf: 1 for a stacked bias.

    For masks by rank, such as ``jax.tree.map(lambda rank: rank > 1, layers.ranks(params, rules))``
    for all matrices, in which a stacked bias must not count as one.
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
    """The `Layers` of every leaf of ``tree``.

    Raises:
      ArgumentValueError: a leaf has no such axis, it does not divide into the parts, or two specs
        name the same axis.
    """
    return map_with_path(lambda path, x: layers_of(layer_rules, path, x), tree)


def layers_of(layer_rules: rules.Rules, path: str, x: Any) -> Layers:
    """Returns the `Layers` of one array; see `assign`.

    Args:
      layer_rules: see `assign`.
      path: of the array.
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


def check_axis_name(axis_name: AxisName) -> None:
    """Raises unless ``axis_name`` is None, a name, names, or rules (path pattern, names).

    Raises:
      ArgumentTypeError: it is none of these.
      ArgumentValueError: a pattern is not a regular expression.
    """
    if not _same_for_all(axis_name):
        rules.check_rules("axis_name", axis_name)  # type: ignore[arg-type]


def check_axis_matches(axis_name: AxisName, tree: Tree) -> None:
    """Raises `ArgumentValueError` where a rule in ``axis_name`` matches no leaf of ``tree``."""
    if not _same_for_all(axis_name):
        rules.check_matches("axis_name", [pattern for pattern, _ in axis_name], tree)  # type: ignore


def assign_axis_names(axis_name: AxisName, tree: Tree) -> Tree:
    """The mesh axes that ``axis_name`` tells for every leaf of ``tree``, as tuples of names.

    Raises:
      ArgumentValueError: the type of a leaf (``check_vma=True``) says that it is not sharded over
        one of these axes.
    """
    return map_with_path(lambda path, x: axis_names_of(axis_name, path, x), tree)


def axis_names_of(axis_name: AxisName, path: str, x: jax.Array) -> tuple[str, ...]:
    """Returns the mesh axes that ``axis_name`` gives for one array; see `assign_axis_names`.

    Raises:
      ValueError: the type of ``x`` says that it does not vary over one of them.
    """
    if _same_for_all(axis_name):
        told = _names(axis_name)
    else:
        told = _names(rules.first_match(axis_name, path, default=()))  # type: ignore[arg-type]
    # A device's place along an axis varies over it: where its type does not say so, none does.
    wrong = [
        name
        for name in sorted(set(told) - varying_axes(x))
        if varying_axes(jax.eval_shape(lambda name=name: jax.lax.axis_index(name)))
    ]
    if wrong:
        advice = "leave axis_name out where check_vma=True"
        raise ArgumentValueError(
            "axis_name",
            "name mesh axes over which the leaf varies",
            wrong,
            advice,
            sentence=f"{{argument}}: {path} is told to be cut over the mesh axes {wrong}, over "
            f"which it does not vary by its type: {advice}",
        )
    return told


def all_axis_names(axis_name: AxisName) -> set[str]:
    """Every mesh axis that ``axis_name`` tells of any leaf."""
    if _same_for_all(axis_name):
        return set(_names(axis_name))
    return {name for _, names in axis_name for name in _names(names)}  # type: ignore


def _same_for_all(axis_name: AxisName) -> bool:
    if axis_name is None or isinstance(axis_name, str):
        return True
    return isinstance(axis_name, Sequence) and all(isinstance(name, str) for name in axis_name)


def _names(names: Any) -> tuple[str, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def check_averaged(path: str, update: jax.Array, parameter: jax.Array) -> None:
    """Raises where ``update`` is known to differ between devices that hold the same parameter."""
    apart = varying_axes(update) - varying_axes(parameter)
    if apart:
        axes, advice = sorted(apart), "average the gradient over them first (jax.lax.pmean)"
        raise ArgumentValueError(
            "updates",
            "be the same on all devices that hold the same parameter",
            axes,
            advice,
            sentence=f"the update of {path} varies over the mesh axes {axes}, which its parameter "
            f"does not: {advice}",
        )


def squared_norm(x: jax.Array, layers: Layers = (), axis_names: Sequence[str] = ()) -> jax.Array:
    """sum(x^2) of each layer, in float32 or wider, in one pass over ``x``.

    Args:
      x: any shape.
      layers: what a layer is in ``x``.
      axis_names: mesh axes ``x`` is cut over, beside those its type tells.

    Returns:
      Shape ``()`` for one layer, else ``(layers,)`` in row-major order of the array's axes.

    Raises:
      ValueError: in a mapped context, layers are spread over a mesh axis that there is not.
    """
    kept = [layer.axis for layer in layers]
    total = jnp.sum(jnp.square(wide(x)), axis=[i for i in range(x.ndim) if i not in kept])
    if layers:
        # Blocks are summed last, on the small remainder: a reshape of x itself would make XLA
        # gather an array that is sharded along the axis.
        total = _gathered(total)
        blocks = []
        for size, layer in zip(total.shape, layers, strict=True):
            count = layer.count(x.shape)
            blocks += [count, size // max(count, 1)]
        total = total.reshape(blocks).sum(axis=range(1, len(blocks), 2)).reshape(-1)
    apart = {layer.mesh_axis for layer in layers if layer.mesh_axis}
    cut = varying_axes(x) | set(axis_names)
    known = jax.sharding.get_abstract_mesh().axis_names
    unknown = sorted(apart.difference(known))
    if cut and known and unknown:  # a misspelt name would be ignored, and these layers share a norm
        raise ArgumentValueError(
            "mesh_axis",
            f"be one of {known}",
            unknown,
            sentence=f"stacked: {{argument}} must be one of {known}, got {', '.join(unknown)}",
        )
    axes = tuple(sorted(cut - apart))
    return jax.lax.psum(total, axes) if axes else total


def _gathered(x: jax.Array) -> jax.Array:
    """``x`` whole on every device where its type says it is cut over an Explicit mesh axis.

    Else a reshape would be refused, and state would change its type after the first step.
    """
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def norm(x: jax.Array, layers: Layers = (), axis_names: Sequence[str] = ()) -> jax.Array:
    """The Euclidean norm of each layer: the square root of `squared_norm`."""
    return jnp.sqrt(squared_norm(x, layers, axis_names))


def global_norm(tree: Tree, axis_name: AxisName = None) -> jax.Array:
    """The Euclidean norm of all leaves together: (), float32 or wider.

    Args:
      tree: arrays and `SparseRows`; rows of the same id count as one, their sum.
      axis_name: the mesh axes leaves are cut over, beside those their types tell.
    """
    arrays = rows.summed(tree)
    axis_names = assign_axis_names(axis_name, arrays)
    squares = jax.tree.map(lambda x, names: squared_norm(x, (), names), arrays, axis_names)
    return jnp.sqrt(sum(jax.tree.leaves(squares), jnp.zeros((), jnp.float32)))


def norm_shape(shape: Sequence[int], layers: Layers) -> tuple[int, ...]:
    """The shape of the norms of an array of ``shape``: ``()``, or ``(layers,)``."""
    return (math.prod(layer.count(shape) for layer in layers),) if layers else ()


def fill(value: float, x: jax.typing.ArrayLike, layers: Layers) -> jax.Array:
    """``value`` for each layer of ``x``, float32, of the type that the norms of ``x`` will have."""
    values = jnp.full(norm_shape(jnp.shape(x), layers), value, jnp.float32)
    apart = varying_axes(x) & {layer.mesh_axis for layer in layers}
    return jax.lax.pcast(values, tuple(sorted(apart)), to="varying") if apart else values


def expand(values: jax.Array, shape: Sequence[int], layers: Layers) -> jax.Array:
    """One value a layer, shaped so that it multiplies an array of ``shape``."""
    if not layers:
        return values
    counts = [1] * len(shape)
    for layer in layers:
        counts[layer.axis] = layer.count(shape)
    values = values.reshape(counts)
    for layer in layers:
        if layer.parts is not None:
            values = jnp.repeat(values, shape[layer.axis] // layer.parts, axis=layer.axis)
    return values
