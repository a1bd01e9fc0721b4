"""Lifts pieces that are declared for one array to trees of arrays.

A piece declares how it changes the update of one array and what its state consists of. From this
declaration `leafwise` makes an ordinary optax transformation, and `update_leaves` can apply several
pieces to one leaf before it begins the next.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import rows, rules
from optim_zoo.errors import parameters_missing
from optim_zoo.tree import (
    Tree,
    array,
    check_distinct,
    check_floating,
    leaf_paths,
    promoting,
    wide_dtype,
)


class Leaf(NamedTuple):
    """What a piece may read about the leaf that it updates."""

    path: str  # see `optim_zoo.tree.leaves_with_path`
    parameter: Any  # the array; None where the piece declares that it does not use it
    shared: Any  # what the declaration's `begin` computed once for all leaves


def _no_fields(path: str, x: jax.Array) -> Mapping[str, Any]:
    """Returns no fields; the default of `Declaration.init`."""
    return {}


def _begin_without_change(state: Any) -> tuple[Any, Any]:
    """Returns the state unchanged; the default of `Declaration.begin`."""
    return state, None


def _accept(params: Tree) -> None:
    """Accepts any parameters; the default of `Declaration.check`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declaration:
    """Describes how a piece treats one array, and which fields its state has.

    The state of a tree is a NamedTuple. The state of one leaf is the same NamedTuple, in which a
    field like the parameters holds one array, a field keyed by path holds the value of this leaf
    (None if it has none), and a shared field has the same value for every leaf.

    Attributes:
      name: the name of the piece, for messages.
      update: ``(u, state of the leaf, leaf) -> (u, state of the leaf)``; u is an array, or
        `SparseRows` where ``takes_rows``.
      state: the NamedTuple. Fields that are named in neither ``like_params`` nor ``by_path`` are
        shared by all leaves.
      like_params: fields that are trees like the parameters.
      by_path: fields that are dicts from the path of a leaf to its value.
      init: ``(path, parameter) -> {field: value}``, for the fields of one leaf. A leaf without an
        entry in the fields keyed by path leaves them out.
      init_shared: ``() -> {field: value}``, for the shared fields.
      begin: ``state -> (state, shared)``, called once for each update: returns the state with
        updated shared fields, and the value for `Leaf.shared`.
      check: called with the parameters in ``init``; raises if the piece does not fit them.
      params: whether the piece uses the parameters in ``update``: ``"unused"``, ``"optional"``
        (`Leaf.parameter` is then None where they were not passed) or ``"required"``.
      takes_rows: whether ``update`` accepts `SparseRows`.
      waits_for: a field keyed by path, such as the trust ratio, whose computation reads the whole
        update of the leaf. `chain_leaf_by_leaf` starts the next leaf after it.
      mask: bools like the parameters, or a function that makes them; the piece leaves the update
        and the state of a leaf with False unchanged.
    """

    name: str
    update: Callable[[Any, Any, Leaf], tuple[Any, Any]]
    state: Callable[..., Any] = optax.EmptyState
    like_params: tuple[str, ...] = ()
    by_path: tuple[str, ...] = ()
    init: Callable[[str, jax.Array], Mapping[str, Any]] = _no_fields
    init_shared: Callable[[], Mapping[str, Any]] = dict
    begin: Callable[[Any], tuple[Any, Any]] = _begin_without_change
    check: Callable[[Tree], None] = _accept
    params: Literal["unused", "optional", "required"] = "unused"
    takes_rows: bool = False
    waits_for: str | None = None
    mask: rules.Mask = None


class Leafwise(optax.GradientTransformationExtraArgs):
    """A transformation that carries the `Declaration` of its piece; made by `leafwise`.

    Its ``update`` accepts and ignores extra arguments.
    """

    leaf: Declaration

    def _replace(self, **functions: Any) -> optax.GradientTransformationExtraArgs:
        # What has another init or update is no longer what the declaration describes.
        return optax.GradientTransformationExtraArgs(*self)._replace(**functions)


def leafwise(declaration: Declaration) -> Leafwise:
    """Lifts a piece that is declared for one array to trees of arrays.

    The state has the containers that the parameters have in ``init``, and keeps them. Updates keep
    their own.

    Raises:
      ArgumentTypeError: in ``init``, a parameter is not floating-point; in ``update``, a gradient
        is not, or it is `SparseRows` and the piece does not accept them.
      ArgumentValueError: in ``init``, two leaves share a path and the state is keyed by path; in
        ``update``, required parameters are missing, or an update does not fit its parameter.
    """

    def init(params: Tree) -> Any:
        check_floating(params)
        declaration.check(params)
        rules.mask_of("mask", declaration.mask, params)
        paths = leaf_paths(params)
        structure: Any = jax.tree.structure(params)
        of_leaves = list(map(declaration.init, paths, jax.tree.leaves(params)))
        fields: dict[str, Any] = {}
        for field in declaration.like_params:
            fields[field] = structure.unflatten([made[field] for made in of_leaves])
        if declaration.by_path:
            check_distinct(paths)
        for field in declaration.by_path:
            made_by_path = zip(paths, of_leaves, strict=True)
            fields[field] = {path: made[field] for path, made in made_by_path if field in made}
            if not of_leaves:
                # optax.tree.map_params calls init with a tree without leaves to find the parts of
                # the state that are like the parameters. Another part needs a leaf to be seen.
                fields[field] = jnp.zeros((), jnp.float32)
        return declaration.state(**declaration.init_shared(), **fields)

    def update(
        updates: Tree, state: Any, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, Any]:
        del extra
        updates, (state,) = update_leaves([declaration], updates, [state], params)
        return updates, state

    made = Leafwise(init, update)
    made.leaf = declaration
    return made


@promoting
def update_leaves(
    pieces: Sequence[Declaration],
    updates: Tree,
    states: Sequence[Any],
    params: Tree | None,
    wait: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[Tree, list[Any]]:
    """Applies pieces one after another to each leaf.

    Args:
      pieces: their declarations.
      updates: arrays and `SparseRows`.
      states: the state of each piece.
      params: the parameters, or None.
      wait: ``(u, known) -> u``, called with the update of a leaf and with the value that the leaf
        before it has computed last for a field `Declaration.waits_for`.

    Returns:
      The updates, and the state of each piece.
    """
    _check(pieces, updates, states, params)
    structure: Any = jax.tree.structure(updates, is_leaf=rows.is_sparse)
    paths = leaf_paths(updates, is_leaf=rows.is_sparse)
    uses_params = params is not None and any(piece.params != "unused" for piece in pieces)
    parameters = structure.flatten_up_to(params) if uses_params else [None] * len(paths)
    begun = [piece.begin(state) for piece, state in zip(pieces, states, strict=True)]
    before = [_split(piece, state, structure, paths)
              for piece, (state, _) in zip(pieces, begun, strict=True)]  # fmt: skip
    masks = [_mask(piece, updates if params is None else params, len(paths)) for piece in pieces]
    after: list[list[Any]] = [[] for _ in pieces]
    made, known = [], None
    for i, u in enumerate(map(array, structure.flatten_up_to(updates))):
        if wait is not None and known is not None:
            u = rows.on_rows(wait, u, known)
        for k, piece in enumerate(pieces):
            leaf, state = Leaf(paths[i], array(parameters[i]), begun[k][1]), before[k][i]
            if masks[k][i]:
                u, state = piece.update(u, state, leaf)
            after[k].append(state)
            if piece.waits_for and getattr(state, piece.waits_for) is not None:
                known = getattr(state, piece.waits_for)
        made.append(u)
    joined = [
        _join(piece, state, paths, of_leaves)
        for piece, (state, _), of_leaves in zip(pieces, begun, after, strict=True)
    ]
    return structure.unflatten(made), joined


def _check(
    pieces: Sequence[Declaration], updates: Tree, states: Sequence[Any], params: Tree | None
) -> None:
    """Raises unless updates, states and parameters are of one tree and every piece takes them."""
    for piece, state in zip(pieces, states, strict=True):
        if piece.params == "required" and params is None:
            raise parameters_missing(piece.name)
        like = [getattr(state, field) for field in piece.like_params[:1]]
        if params is not None and piece.params != "unused":
            like.append(params)
        for tree in like or [updates]:
            rows.check_updates(piece.name, updates, tree, sparse=piece.takes_rows)


def _mask(piece: Declaration, tree: Tree, leaves: int) -> list[bool]:
    """Returns whether the piece changes each leaf."""
    if piece.mask is None:
        return [True] * leaves
    return jax.tree.leaves(rules.mask_of("mask", piece.mask, tree))


def _split(piece: Declaration, state: Any, structure: Any, paths: Sequence[str]) -> list[Any]:
    """Returns the state of each leaf."""
    columns = {field: structure.flatten_up_to(getattr(state, field)) for field in piece.like_params}
    for field in piece.by_path:
        values = getattr(state, field)
        values = values if isinstance(values, Mapping) else {}  # an array if init saw no leaf
        columns[field] = [values.get(path) for path in paths]
    return [
        state._replace(**{field: column[i] for field, column in columns.items()})
        for i in range(len(paths))
    ]


def _join(piece: Declaration, state: Any, paths: Sequence[str], of_leaves: Sequence[Any]) -> Any:
    """Returns the state of the tree; ``state`` gives the shared fields and the containers."""
    fields: dict[str, Any] = {}
    for field in piece.like_params:
        structure: Any = jax.tree.structure(getattr(state, field))
        fields[field] = structure.unflatten([getattr(made, field) for made in of_leaves])
    for field in piece.by_path if paths else ():
        values = zip(paths, [getattr(made, field) for made in of_leaves], strict=True)
        fields[field] = {path: value for path, value in values if value is not None}
    return state._replace(**fields)


def count_step(state: Any) -> tuple[Any, None]:
    """Counts the step: the ``begin`` of a piece whose only shared field is ``count``."""
    return state._replace(count=optax.safe_increment(state.count)), None


def zero_count() -> dict[str, jax.Array]:
    """Returns a count of 0: the ``init_shared`` of a piece whose only shared field is ``count``."""
    return {"count": jnp.zeros((), jnp.int32)}


def zeros(x: jax.Array) -> jax.Array:
    """Returns zeros of the shape of ``x``, in float32 or wider: the start of an average."""
    return jnp.zeros_like(x, dtype=wide_dtype(x))
