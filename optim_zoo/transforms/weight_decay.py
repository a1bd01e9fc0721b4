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
    """Adds the decayed parameters to the updates.

    ::

        u <- u + weight_decay x

    After `scale_by_adam` this is the decoupled weight decay of AdamW (arXiv 1711.05101). Before it,
    this is L2 regularization.

    Args:
      weight_decay: A finite number >= 0. At 0, as a Python number, updates pass unchanged.
      exclude: Path patterns of the leaves that are not decayed. A pattern is a regular expression,
        searched for (``re.search``) in the path of a leaf, such as ``encoder/layer_0/bias``.
      mask: As in optax, a tree of bools like the parameters, or a function from the parameters to
        one. A leaf with False is not decayed, as if a pattern had excluded it.

    Returns:
      A piece whose state is the empty `AddDecayedWeightsState`.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``init``, a path pattern matches no
        leaf, or the mask does not have the structure of the parameters; in ``update``, the
        parameters are missing, or a gradient has another shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array, or a leaf of the mask is not a bool.

    Example:
      ```python
      tx = optax.chain(
          optim_zoo.scale_by_adam(),
          optim_zoo.add_decayed_weights(0.1, exclude=["bias$"]),
          optim_zoo.scale_by_learning_rate(1e-3),
      )
      ```
    """
    ranges.check("weight_decay", weight_decay, 0.0, open_high=True)
    rules.check_patterns("exclude", exclude)

    is_zero = isinstance(weight_decay, (int, float)) and weight_decay == 0

    def update(
        u: jax.Array, state: AddDecayedWeightsState, leaf: Leaf
    ) -> tuple[jax.Array, AddDecayedWeightsState]:
        if is_zero or rules.matches(exclude, leaf.path):
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
