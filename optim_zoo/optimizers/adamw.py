"""AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

import jax
import optax

from optim_zoo import rules
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import add_decayed_weights, scale_by_adam, scale_by_learning_rate


@accepts_optax_arguments
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 1e-4,
    *,
    bias_correction: bool = True,
    exclude_from_weight_decay: rules.Patterns = (),
    mask: rules.Mask = None,
    eps_root: jax.typing.ArrayLike = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Adds decoupled weight decay to Adam.

    ::

        u  = (mu / c1) / (sqrt(nu / c2) + eps),   mu, nu, c1 and c2 as in adam
        x <- x - learning_rate (u + weight_decay x)

    The order is Adam's direction, weight decay, learning rate. The decay is thus multiplied by the
    learning rate, as in ``optax.adamw`` and ``torch.optim.AdamW``, and not by a schedule of its own
    as in the paper (arXiv 1711.05101). The fifth positional argument is the weight decay, where
    ``optax.adamw`` has ``eps_root``; pass it by name.

    It agrees with ``optax.adamw`` (0.2.8) to 1e-9 in float64.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.
      weight_decay: A finite number >= 0. At 0, as a Python number, nothing is decayed.
      bias_correction: Whether mu and nu are divided by c1 and c2. If False, c1 = c2 = 1.
      exclude_from_weight_decay: Path patterns of the leaves that are not decayed. A pattern is a
        regular expression, searched for (``re.search``) in the path of a leaf, such as
        ``encoder/layer_0/bias``.
      mask: As in optax, a tree of bools like the parameters, or a function from the parameters to
        one. A leaf with False is not decayed, as if a pattern had excluded it.
      eps_root: A finite number >= 0, added under the root. At the default 0, the derivative of a
        root of 0 is taken as 0, so that gradients through the update stay finite.
      nesterov: Whether the momentum is Nesterov's, as in `nadam`. Needs ``bias_correction=True``.

    Returns:
      A transformation whose state is the tuple of the states of its pieces: ``ScaleByAdamState``
      (the count of steps, mu and nu; the moments are like the parameters, in float32 or wider),
      ``AddDecayedWeightsState`` (empty) and ``ScaleByLearningRateState`` (the step and the learning
      rate).

    Raises:
      ArgumentValueError: An argument is out of its range; in ``init``, a path pattern matches no
        leaf; in ``update``, the parameters are missing, or a gradient has another shape than its
        parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.adamw(1e-3, weight_decay=0.1, exclude_from_weight_decay=["bias$"])
      ```
    """
    return optax.chain(
        scale_by_adam(
            b1, b2, eps, bias_correction=bias_correction, eps_root=eps_root, nesterov=nesterov
        ),
        add_decayed_weights(
            weight_decay,
            rules.named("exclude_from_weight_decay", exclude_from_weight_decay),
            mask=mask,
        ),
        scale_by_learning_rate(learning_rate),
    )
