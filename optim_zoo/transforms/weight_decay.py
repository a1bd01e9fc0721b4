"""Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101)."""

from typing import NamedTuple

import jax

from optim_zoo import ranges, rules
from optim_zoo.transforms.leafwise import Declaration, Leaf, Leafwise, leafwise
from optim_zoo.tree import wide


class AddDecayedWeightsState(NamedTuple):
    """State of `add_decayed_weights`, which is empty and only names the piece."""


def add_decayed_weights(
    weight_decay: jax.typing.ArrayLike,
    exclude: rules.Patterns = (),
    *,
    mask: rules.Mask = None,
) -> Leafwise:
    """Adds the decayed parameters to the updates: u <- u + weight_decay x.

    Behind `scale_by_adam` this is AdamW's decoupled decay; before it, L2 regularisation. Where
    ``weight_decay`` is the number 0 updates pass unchanged. ``optax.add_decayed_weights`` takes a
    mask where this takes path patterns.

    Args:
      weight_decay: >= 0.
      exclude: path patterns (``re.search``) of leaves that are not decayed.

    Raises:
      ValueError: ``weight_decay`` is negative; in ``init``, a pattern matches no leaf; in
        ``update``, the parameters are missing or an update has another shape than its parameter.
    """
    ranges.check("weight_decay", weight_decay, 0.0, open_high=True)
    rules.check_patterns("exclude", exclude)

    nothing = isinstance(weight_decay, (int, float)) and weight_decay == 0

    def update(
        u: jax.Array, state: AddDecayedWeightsState, leaf: Leaf
    ) -> tuple[jax.Array, AddDecayedWeightsState]:
        if nothing or rules.matches(exclude, leaf.path):
            return u, state
        return wide(u) + weight_decay * wide(leaf.parameter), state

    return leafwise(
        Declaration(
            name="add_decayed_weights",
            update=update,
            state=AddDecayedWeightsState,
            check=lambda params: rules.check_matches("exclude", exclude, params),
            params="required",
            mask=mask,
        )
    )
