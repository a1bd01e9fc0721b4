"""The counters of skipped steps in the states of wrappers, and how they are found there."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import optax

from optim_zoo.errors import ArgumentTypeError
from optim_zoo.tree import Tree


class SkippedSteps(NamedTuple):
    """The number of steps that a guard has skipped."""

    total: jax.Array  # (), int32: since the start, saturating
    in_a_row: jax.Array  # (), int32: up to the last step; 0 after a step that was made, saturating
    limit: jax.Array  # (), int32: the number in a row at which `guards.check` raises

    @classmethod
    def none(cls, limit: int) -> Self:
        """Returns a counter with no skipped steps."""
        return cls(
            jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.asarray(limit, jnp.int32)
        )

    def after_step(self, made: jax.Array, limit: int) -> Self:
        """Returns the counter after one more step.

        Args:
          made: (), bool: whether the step was made and not skipped.
          limit: the guard's current limit; a run may resume with another one.
        """
        return type(self)(
            total=jnp.where(made, self.total, optax.safe_increment(self.total)),
            in_a_row=jnp.where(made, 0, optax.safe_increment(self.in_a_row)),
            limit=jnp.full_like(self.limit, limit),
        )


class SkippedMicroBatches(NamedTuple):
    """The number of micro-batches that an accumulation has left out of its means."""

    total: jax.Array  # (), int32: since the start, saturating


_Kind = TypeVar("_Kind", SkippedSteps, SkippedMicroBatches)


def all_of(kind: type[_Kind], state: Tree) -> list[_Kind]:
    """Returns every ``kind`` in ``state``: one for each guard or accumulation.

    Their fields are arrays, also where an ``nnx.Optimizer`` stores each array in a variable.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return [kind(*jax.tree.leaves(node)) for node in nodes if isinstance(node, kind)]


def check_types(caller: str, state: Tree, kinds: Sequence[type[Any]]) -> None:
    """Raises where one of ``kinds`` has become a dictionary in ``state``.

    Functions that find pieces by the types of their states would find nothing there, and return as
    if there were nothing to find.

    Args:
      caller: the function that reads the state, for the message.
      state: any tree.
      kinds: named tuples.

    Raises:
      ArgumentTypeError: the keys of a mapping in ``state`` are fields of one of ``kinds``, as in a
        checkpoint that was restored without a target, or in ``nnx.state(optimizer)``.
    """

    def is_untyped(node: Any) -> bool:
        # Fields without arrays may be missing.
        if not isinstance(node, Mapping) or len(node) < 2:
            return False
        return any(set(node) <= set(kind._fields) for kind in kinds)

    if any(map(is_untyped, jax.tree.leaves(state, is_leaf=is_untyped))):
        advice = (
            "rebuild it with saved_state.rebuild(tx.init(params), state), or pass "
            "optimizer.opt_state instead of nnx.state(optimizer)"
        )
        raise ArgumentTypeError(
            "state",
            "have the types that init gave it",
            "dictionaries",
            advice,
            sentence=f"{caller} recognizes pieces by the types of their states, got a state made "
            f"of dictionaries: {advice}",
        )
