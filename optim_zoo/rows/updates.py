"""Updates that are dense or rows: checks against the parameters, and adding them."""

from typing import Any

import jax
import jax.numpy as jnp

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.rows.sparse_rows import is_sparse
from optim_zoo.tree import Tree, is_partial, leaf_paths, leaves_with_path, wide_dtype


def check_updates(piece: str, updates: Tree, like: Tree, *, sparse: bool = False) -> None:
    """Raises unless ``updates`` is a tree like ``like``, leaf by leaf of the same shape.

    Args:
      piece: who asks, for the message.
      updates: gradients or what a chain made of them.
      like: the parameters, or state that is like them.
      sparse: whether the piece takes `SparseRows`.

    Raises:
      ValueError: a leaf is missing or has another shape; its path and both shapes are named.
      TypeError: a leaf is not real and floating-point, or `SparseRows` reached a piece that does
        not take it.
    """
    given = leaves_with_path(updates, is_leaf=is_sparse)
    if not sparse:
        for path, u in given:
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
        ours, theirs = leaf_paths(like), [path for path, _ in given]
        apart = sorted(set(ours) ^ set(theirs))
        what = f"they differ at {', '.join(apart[:5])}" if apart else "their containers differ"
        raise ArgumentValueError(
            "updates",
            "be a tree like the parameters",
            apart,
            sentence=f"{piece}: gradients must be a tree like the parameters; {what}",
            related=["params"],
        )
    for (path, u), x in zip(given, expected, strict=True):
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
            raise ArgumentTypeError(
                "updates",
                "be real and floating-point",
                dtype,
                sentence=f"{piece}: gradients must be real and floating-point, that of "
                f"{path or 'the parameter'} has dtype {dtype}",
            )
        if jnp.shape(u) != jnp.shape(x) and not is_partial(x):
            raise ArgumentValueError(
                "updates",
                "have the shapes of the parameters",
                jnp.shape(u),
                sentence=f"{piece}: the gradient of {path or 'the parameter'} has shape "
                f"{jnp.shape(u)}, its parameter {jnp.shape(x)}",
                related=["params"],
            )


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """``params + updates``, where a leaf of ``updates`` may be `SparseRows`.

    Dense leaves are added as by ``optax.apply_updates``. Rows are added to the rows of their
    table, and nothing else of it is touched: in place under ``jit`` where ``params`` is donated.

    Raises:
      ValueError: a leaf of ``updates`` has another shape than its parameter.
    """
    structure: Any = jax.tree.structure(params, is_leaf=lambda x: x is None)
    check_updates("apply_updates", updates, params, sparse=True)

    def add(x: jax.Array | None, u: Any) -> jax.Array | None:
        if x is None or u is None:
            return x
        x = jnp.asarray(x)
        if not is_sparse(u):
            return (x + u).astype(x.dtype)
        if u.dtype == x.dtype == wide_dtype(x):
            return x.at[u.ids].add(u.rows, mode="drop")
        # In the wider dtype first, then rounded once.
        u = u.merged()
        moved = (x.at[u.ids].get(mode="clip") + u.rows).astype(x.dtype)
        return x.at[u.ids].set(moved, mode="drop")

    leaves = zip(structure.flatten_up_to(params), structure.flatten_up_to(updates), strict=True)
    return structure.unflatten([add(x, u) for x, u in leaves])
