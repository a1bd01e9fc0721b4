"""Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101)."""

import jax
import optax

from optim_zoo import ranges, rows, rules
from optim_zoo.tree import Tree, wide


def add_decayed_weights(
    weight_decay: jax.typing.ArrayLike, exclude: rules.Patterns = ()
) -> optax.GradientTransformation:
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
    rules.check_patterns("exclude_from_weight_decay", exclude)

    def init(params: Tree) -> optax.EmptyState:
        rules.check_matches("exclude_from_weight_decay", exclude, params)
        return optax.EmptyState()

    def update(
        updates: Tree, state: optax.EmptyState, params: Tree | None = None
    ) -> tuple[Tree, optax.EmptyState]:
        if params is None:
            raise ValueError(
                "add_decayed_weights needs the parameters: update(grads, state, params)"
            )
        rows.check_updates("add_decayed_weights", updates, params)
        if isinstance(weight_decay, (int, float)) and weight_decay == 0:
            return updates, state
        excluded = rules.mask(exclude, params)
        decayed = jax.tree.map(
            lambda u, x, skip: u if skip else wide(u) + weight_decay * wide(x),
            updates,
            params,
            excluded,
        )
        return decayed, state

    return optax.GradientTransformation(init, update)
