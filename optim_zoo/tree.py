"""Paths of leaves, and functions of arrays that are lifted to trees."""

import functools
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyPath, SequenceKey

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError

Tree = Any  # a pytree; the docstring that uses it says what its leaves are

P = ParamSpec("P")
R = TypeVar("R")

_COMPLEX_ADVICE = "store the real and imaginary parts as separate arrays"

# Flax wraps arrays in variables or metadata boxes, whose field ``value`` is not part of a path.
# The types are looked up in Flax only if it is already imported: the core must not import it.
_BOXES = (("flax.nnx", "Variable"), ("flax.core.meta", "AxisMetadata"))


def leaves_with_path(
    tree: Tree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Returns every leaf of ``tree`` with its path, in flattening order.

    A path is the keys, attributes and indices from the root to the leaf, joined by ``/``:
    ``encoder/layer_0/attention/query/kernel``. The field ``value`` of a Flax variable
    (``nnx.Variable``) or metadata box (``flax.core.meta.AxisMetadata``, such as ``nn.Partitioned``
    and ``nn.LogicallyPartitioned``) is left out of the path, wherever in the path it is. A dict of
    arrays, a dict of boxes and an ``nnx.State`` of the same model therefore have the same paths. A
    field ``value`` of any other node is part of the path.

    Args:
      tree: A pytree.
      is_leaf: A function from a node to whether it is a leaf, as in ``jax.tree.leaves``.

    Returns:
      Pairs of path and leaf.
    """
    named = _leaves_with_keys(tree, is_leaf or (lambda _: False))
    return [("/".join(map(_key_name, path)), leaf) for path, leaf in named]


def _leaves_with_keys(tree: Tree, is_leaf: Callable[[Any], bool]) -> list[tuple[KeyPath, Any]]:
    boxes = _box_types()

    def stops(node: Any) -> bool:
        return is_leaf(node) or isinstance(node, boxes)

    leaves: list[tuple[KeyPath, Any]] = []
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=stops):
        if not isinstance(node, boxes) or is_leaf(node):
            leaves.append((path, node))
            continue
        children = jax.tree.leaves_with_path(node, is_leaf=lambda child, box=node: child is not box)
        for (key,), child in children:
            outer = path if key == GetAttrKey("value") else (*path, key)
            leaves += [((*outer, *inner), x) for inner, x in _leaves_with_keys(child, is_leaf)]
    return leaves


def _box_types() -> tuple[type, ...]:
    found = (getattr(sys.modules.get(module), name, None) for module, name in _BOXES)
    return tuple(box for box in found if box is not None)


def is_box(node: Any) -> bool:
    """Returns whether ``node`` is a variable or a metadata box of Flax."""
    return isinstance(node, _box_types())


def _key_name(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
        case _:  # a key class of a foreign pytree
            return str(key).strip(".[]'")


def leaf_paths(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """Returns the path of every leaf, in flattening order; see `leaves_with_path`."""
    return [path for path, _ in leaves_with_path(tree, is_leaf)]


def by_path(tree: Tree) -> dict[str, Any]:
    """Returns the leaves of ``tree``, keyed by path.

    Raises:
      ArgumentValueError: Two leaves have the same path, as in ``{"a/b": x, "a": {"b": y}}``.
    """
    leaves = leaves_with_path(tree)
    check_distinct([path for path, _ in leaves])
    return dict(leaves)


def check_distinct(paths: list[str]) -> None:
    """Raises `ArgumentValueError` if a path occurs more than once."""
    twice = sorted(path for path, count in Counter(paths).items() if count > 1)
    if twice:
        raise ArgumentValueError(
            "params",
            "have leaves with distinct paths",
            twice,
            advice := "rename one of them",
            sentence=f"several leaves have the path {', '.join(twice)}: {advice}",
        )


def map_with_path(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Returns a tree of ``function(path, leaf, *leaves_of_rest)``, one for each leaf of ``tree``.

    The trees in ``rest`` may hold whole subtrees where ``tree`` has leaves.
    """
    leaves = leaves_with_path(tree)
    structure: Any = jax.tree.structure(tree)
    columns = [structure.flatten_up_to(other) for other in rest]
    rows = zip(leaves, *columns, strict=True)
    return structure.unflatten([function(path, x, *others) for (path, x), *others in rows])


def map_to_several(
    function: Callable[..., tuple[Any, ...]],
    outputs: int,
    tree: Tree,
    *rest: Tree,
    is_leaf: Callable[[Any], bool] | None = None,
) -> tuple[Tree, ...]:
    """Maps a function that returns ``outputs`` values, and returns that many trees.

    The trees in ``rest`` may hold whole subtrees where ``tree`` has leaves.
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_leaf)
    structure: Any = jax.tree.structure(tree, is_leaf=is_leaf)
    columns = [structure.flatten_up_to(other) for other in rest]
    results = [function(*row) for row in zip(leaves, *columns, strict=True)]
    return tuple(structure.unflatten([result[i] for result in results]) for i in range(outputs))


def is_partial(tree: Tree) -> bool:
    """Returns whether ``tree`` is empty, or a part of a larger tree, as under ``optax.masked``."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return not leaves or any(isinstance(leaf, optax.MaskedNode) for leaf in leaves)


def array(x: Any) -> Any:
    """Returns a number or a NumPy array as a JAX array, and anything else unchanged.

    The array is not weakly typed: a Python float has JAX's default float dtype.
    """
    if isinstance(x, bool | int | float | complex | np.generic | np.ndarray):
        return jnp.asarray(x, jnp.result_type(x))
    return x


def promoting(function: Callable[P, R]) -> Callable[P, R]:
    """Returns ``function`` with JAX's default promotion of dtypes inside it.

    This library chooses the dtypes of its arithmetic, which combines bfloat16, float32 and
    integers. A caller's ``jax_numpy_dtype_promotion="strict"`` is for the caller's own code.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


def wide(x: jax.typing.ArrayLike) -> jax.Array:
    """Returns ``x`` in float32, or unchanged where its dtype is wider."""
    x = jnp.asarray(x)
    return x.astype(wide_dtype(x))


def wide_copy(x: Any) -> Any:
    """Returns a copy in float32 or wider; for a ``jax.ShapeDtypeStruct``, one of that dtype.

    A state must not share memory with parameters, because a training step may donate both.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(
            x.shape, wide_dtype(jnp.zeros((), x.dtype)), sharding=x.sharding
        )
    return jnp.array(x, wide_dtype(x), copy=True)


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """Returns the square root, with a derivative of 0 instead of infinity at 0.

    Gradients through the update of an optimizer thus stay finite where a gradient, and so its
    second moment or its norm, is 0. The value and its compiled program are those of ``jnp.sqrt``.
    """
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y = root(*primals)
    slope = jnp.where(y == 0, 0, 0.5 / jnp.where(y == 0, 1, y))
    return y, (slope * tangents[0]).astype(y.dtype)


def wide_dtype(x: jax.typing.ArrayLike) -> jnp.dtype:
    """Returns the dtype in which arithmetic on ``x`` is done: float32, or that of ``x`` if wider.

    Raises:
      ArgumentTypeError: ``x`` is complex; squares and norms here are those of real numbers.
    """
    if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        raise ArgumentTypeError(
            "params",
            "be real",
            jnp.result_type(x),
            _COMPLEX_ADVICE,
            sentence=f"complex parameters are not supported: {_COMPLEX_ADVICE}",
        )
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(jnp.result_type(x), jnp.float32)


def check_floating(params: Tree) -> None:
    """Raises unless every leaf of ``params`` is a real floating-point array.

    Raises:
      ArgumentTypeError: A leaf is not. The message names its path and dtype.
    """
    for path, x in leaves_with_path(params):
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            advice = (
                _COMPLEX_ADVICE
                if jnp.issubdtype(dtype, jnp.complexfloating)
                else "leave it out with optax.masked or optax.partition"
            )
            raise ArgumentTypeError(
                "params",
                "be floating-point",
                dtype,
                advice,
                sentence=f"parameters must be floating-point, {path or 'the parameter'} has dtype "
                f"{dtype}: {advice}",
            )


def varying_axes(x: jax.typing.ArrayLike) -> frozenset[str]:
    """Returns the mesh axes over which ``x`` varies by its type under ``shard_map``.

    The result is empty under ``jit`` and ``pmap``, and with ``check_vma=False``, where types do not
    record it.
    """
    return frozenset(jax.typeof(x).manual_axis_type.varying)
