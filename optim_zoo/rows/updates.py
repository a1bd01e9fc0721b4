"""Adding updates, dense or `SparseRows`, to parameters, and checks that gradients fit them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.rows.sparse_rows import is_sparse
from optim_zoo.tree import Tree, array, is_partial, leaf_paths, leaves_with_path, wide_dtype


def check_updates(piece: str, updates: Tree, like: Tree, *, sparse: bool = False) -> None:
    """Raises unless the leaves of ``updates`` are real and fit those of ``like``.

    They fit where they have the same paths and shapes.

    Args:
      piece: the name of the transformation that checks, for the message.
      updates: gradients, or updates made from them.
      like: the parameters, or state that is like them.
      sparse: whether the transformation accepts `SparseRows`.

    Raises:
      ArgumentValueError: a leaf is missing or has another shape. The message names the path.
      ArgumentTypeError: a leaf is not real and floating-point, or it is `SparseRows` and the
        transformation does not accept them.
    """
    received = leaves_with_path(updates, is_leaf=is_sparse)
    if not sparse:
        for path, u in received:
            if is_sparse(u):
                advice = "use lazy_adam for it (optax.partition), or its to_dense()"
                raise ArgumentTypeError(
                    "updates",
                    "be arrays",
                    u,
                    advice,
                    sentence=f"{piece} takes no SparseRows, which the gradient of {path} is: "
                    f"{advice}",
                )
    structure: Any = jax.tree.structure(updates, is_leaf=is_sparse)
    try:
        expected = structure.flatten_up_to(like)
    except (ValueError, TypeError, KeyError):
        expected = None
    if expected is None or len(expected) != len(jax.tree.leaves(like, is_leaf=is_sparse)):
        raise _other_tree(piece, "gradients", updates, like)
    for (path, u), x in zip(received, expected, strict=True):
        if not jax.tree_util.all_leaves([x], is_sparse) and not is_partial(x):
            name, kind = path or "the parameter", type(x).__name__
            raise ArgumentValueError(
                "updates",
                "be a tree like the parameters",
                type(u).__name__,
                sentence=f"{piece}: gradients must be a tree like the parameters; that of {name} "
                f"is an array, its parameter is in a {kind}",
                related=["params"],
            )
        dtype = u.dtype if is_sparse(u) else jnp.result_type(u)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise _type_error(piece, "gradient", path, dtype)
        if jnp.shape(u) != jnp.shape(x) and not is_partial(x):
            raise _other_shape(piece, "gradient", path, u, x)


def _other_tree(piece: str, what: str, updates: Tree, like: Tree) -> ArgumentValueError:
    """Returns the error about trees of different structure."""
    ours, theirs = leaf_paths(like), leaf_paths(updates, is_leaf=is_sparse)
    different = sorted(set(ours) ^ set(theirs))
    difference = "their containers differ"
    if different:
        difference = f"they differ at {', '.join(different[:5])}"
    return ArgumentValueError(
        "updates",
        "be a tree like the parameters",
        different,
        sentence=f"{piece}: {what} must be a tree like the parameters; {difference}",
        related=["params"],
    )


def _type_error(piece: str, what: str, path: str, dtype: Any) -> ArgumentTypeError:
    """Returns the error about a gradient or an update that is not real."""
    return ArgumentTypeError(
        "updates",
        "be real and floating-point",
        dtype,
        sentence=f"{piece}: {what}s must be real and floating-point, that of "
        f"{path or 'the parameter'} has dtype {dtype}",
    )


def _other_shape(piece: str, what: str, path: str, u: Any, x: Any) -> ArgumentValueError:
    """Returns the error about a gradient or an update of another shape than its parameter."""
    return ArgumentValueError(
        "updates",
        "have the shapes of the parameters",
        jnp.shape(u),
        sentence=f"{piece}: the {what} of {path or 'the parameter'} has shape {jnp.shape(u)}, "
        f"its parameter {jnp.shape(x)}",
        related=["params"],
    )


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Returns ``params + updates``, where a leaf of ``updates`` may be `SparseRows`.

    Dense leaves are added as by ``optax.apply_updates``. `SparseRows` are added to the rows of
    their parameter that they hold. Under ``jit``, where ``params`` is donated, this changes those
    rows in place and touches no others. Every parameter keeps its dtype.

    Args:
      params: a tree of arrays, numbers, None and ``optax.MaskedNode``.
      updates: a tree of the same structure, as ``update`` returned it: arrays of the shapes of the
        parameters, or `SparseRows`. A parameter remains unchanged where it is None or
        ``optax.MaskedNode``, where its update is an ``optax.MaskedNode``, and where its update has
        JAX's dtype float0, as the gradient of integers and random keys has. So integers, booleans
        and random keys may be among the parameters if ``optax.masked`` or ``optax.partition``
        leaves them out of the optimizer.

    Raises:
      ArgumentValueError: a leaf of ``updates`` is missing or has another shape than its parameter.
      ArgumentTypeError: an update is complex and its parameter is not.
    """
    leaves = leaves_with_path(params, is_leaf=_stays)
    structure: Any = jax.tree.structure(params, is_leaf=_stays)
    try:
        changes = structure.flatten_up_to(updates)
    except (ValueError, TypeError, KeyError):
        raise _other_tree("apply_updates", "updates", updates, params) from None
    for (_, x), u in zip(leaves, changes, strict=True):
        if not (_stays(x) or _is_masked(u) or jax.tree_util.all_leaves([u], is_sparse)):
            raise _other_tree("apply_updates", "updates", updates, params)
    moved = [_moved(path, x, u) for (path, x), u in zip(leaves, changes, strict=True)]
    return structure.unflatten(moved)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _stays(x: Any) -> bool:
    """Returns whether ``x`` takes the place of a parameter and receives no update."""
    return x is None or _is_masked(x)


def _moved(path: str, x: Any, u: Any) -> Any:
    """Returns a parameter after its update."""
    if _stays(x) or _is_masked(u):
        return x
    if jnp.shape(u) != jnp.shape(x):
        raise _other_shape("apply_updates", "update", path, u, x)
    if not is_sparse(u) and jnp.result_type(u) == jax.dtypes.float0:
        return x
    x, u = array(x), array(u)
    is_complex = jnp.issubdtype(u.dtype, jnp.complexfloating)
    if is_complex and not jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise _type_error("apply_updates", "update", path, u.dtype)
    if not is_sparse(u):
        return (x + u).astype(x.dtype)
    if u.dtype == x.dtype == wide_dtype(x):
        return x.at[u.ids].add(u.rows, mode="drop")
    # The rows of the same id are added in the wider dtype, and the sum is rounded once.
    u = u.merged()
    moved = (x.at[u.ids].get(mode="clip") + u.rows).astype(x.dtype)
    return x.at[u.ids].set(moved, mode="drop")
