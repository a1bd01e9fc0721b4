"""A chain that finishes one leaf before it begins the next, which saves memory on CPUs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim_zoo import rows
from optim_zoo.transforms.layerwise import ScaleByTrustRatioState
from optim_zoo.tree import Tree, leaf_paths, varying_axes


def chain_leaf_by_leaf(*pieces: optax.GradientTransformation) -> optax.GradientTransformation:
    """``optax.chain`` of pieces, one leaf after another up to the trust ratio: the same numbers.

    A direction that is scaled by its own norm lies in memory between two passes over it. Of leaves
    that wait for nothing, XLA on a CPU computes all directions before it scales the first, and
    needs as much memory again as the parameters take. Here the gradient of a leaf waits for the
    trust ratio of the leaf before: one direction at a time, out of memory that is in the cache
    still. It waits on a CPU only, and only where that is the one device, since reductions over
    devices that wait for one another cannot be joined. Numbers and state are always the chain's.

    Args:
      pieces: of this library, one of them with a `ScaleByTrustRatioState`, or this is
        ``optax.chain``. Those up to it treat every leaf alone; their state is one value for all
        leaves, a tree like the parameters, or a dict from the paths of leaves. What sees several
        leaves at once, such as clipping by the global norm, belongs in front of this chain.

    Raises:
      ValueError: there is no piece.
    """
    if not pieces:
        raise ValueError("chain_leaf_by_leaf needs pieces, got none")
    chain = optax.chain(*pieces)

    def update(
        updates: Tree, state: tuple[Any, ...], params: Tree | None = None
    ) -> tuple[Tree, tuple[Any, ...]]:
        structure: Any = jax.tree.structure(updates, is_leaf=rows.is_sparse)
        alike = structure == jax.tree.structure(params)  # else the first piece says what is wrong
        adapts = [isinstance(piece, ScaleByTrustRatioState) for piece in state]
        in_order = alike and structure.num_leaves > 1 and any(adapts)
        if not in_order or jax.device_count() > 1:
            return chain.update(updates, state, params)
        end = 1 + adapts.index(True)
        in_line, rest = optax.chain(*pieces[:end]), optax.chain(*pieces[end:])
        paths = leaf_paths(params)
        leaves = zip(
            paths,
            structure.flatten_up_to(updates),
            structure.flatten_up_to(params),
            _parts(state[:end], structure, paths),
            strict=True,
        )
        scaled, parts, ratio = [], [], None
        for path, u, x, part in leaves:
            u = u if ratio is None else _wait(u, ratio)
            new, part = in_line.update({path: u}, part, {path: x})
            scaled.append(new[path])
            parts.append(part)
            ratio = part[-1].trust_ratio.get(path, ratio)
        joined = _joined(parts, state[:end], structure, paths)
        updates, others = rest.update(structure.unflatten(scaled), state[end:], params)
        return updates, (*joined, *others)

    return optax.GradientTransformation(chain.init, update)


@jax.jit  # so that it is traced once a shape
def _wait(x: jax.Array, ratio: jax.Array) -> jax.Array:
    """``x``, on a CPU not before ``ratio`` is known; nothing is seen of one that is not finite.

    XLA on a CPU drops an ``optimization_barrier``, and cannot know that a number times zero is
    zero.
    """
    if varying_axes(ratio) - varying_axes(x):
        return x  # under shard_map its type would change

    def on_cpu(x: jax.Array, ratio: jax.Array) -> jax.Array:
        known = jnp.sum(jnp.where(jnp.isfinite(ratio), ratio, 0)) * 0
        return x + known.astype(x.dtype)

    return jax.lax.platform_dependent(x, ratio, cpu=on_cpu, default=lambda x, _: x)


def _parts(state: tuple[Any, ...], structure: Any, paths: Sequence[str]) -> list[tuple[Any, ...]]:
    """The state of each leaf, as the chain of a tree of this leaf alone would have it."""

    def of_each(field: Any) -> list[Any]:
        if _is_shared(field):
            return [field] * len(paths)
        if _is_by_path(field, paths):
            return [{path: field[path]} if path in field else {} for path in paths]
        return [{path: x} for path, x in zip(paths, structure.flatten_up_to(field), strict=True)]

    fields = [[of_each(field) for field in piece] for piece in state]
    return [
        tuple(
            type(piece)(*(each[i] for each in of)) for piece, of in zip(state, fields, strict=True)
        )
        for i in range(len(paths))
    ]


def _joined(
    parts: Sequence[tuple[Any, ...]], state: tuple[Any, ...], structure: Any, paths: Sequence[str]
) -> tuple[Any, ...]:
    """The state whose `_parts` these are; ``state`` is the one before the step."""

    def joined(before: Any, parts: list[Any]) -> Any:
        if _is_shared(before):
            return parts[0]  # they are all the same
        by_path = {path: x for part in parts for path, x in part.items()}
        if _is_by_path(before, paths):
            return by_path
        return structure.unflatten([by_path[path] for path in paths])

    return tuple(
        type(piece)(
            *(joined(field, [part[i][j] for part in parts]) for j, field in enumerate(piece))
        )
        for i, piece in enumerate(state)
    )


def _is_shared(field: Any) -> bool:
    return jax.tree_util.all_leaves([field])


def _is_by_path(field: Any, paths: Sequence[str]) -> bool:
    return isinstance(field, dict) and field.keys() <= set(paths)
