"""Ranger: RAdam inside Lookahead (lessw2020/Ranger-Deep-Learning-Optimizer)."""

import jax
import optax

from optim_zoo import rules
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.optimizers.lookahead import lookahead
from optim_zoo.transforms import (
    add_decayed_weights,
    centralize_gradients,
    scale_by_learning_rate,
    scale_by_radam,
)


@accepts_optax_arguments
def ranger(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-5,
    weight_decay: jax.typing.ArrayLike = 0.0,
    *,
    sync_period: int = 6,
    slow_step_size: jax.typing.ArrayLike = 0.5,
    threshold: jax.typing.ArrayLike = 5.0,
    gradient_centralization: bool = False,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformationExtraArgs:
    """Runs RAdam with decoupled weight decay inside Lookahead.

    ::

        g    <- g - mean(g over all axes but the last)         with gradient_centralization
        fast <- fast - learning_rate (u + weight_decay fast),  u the direction of radam
        slow <- slow + slow_step_size (fast - slow),  fast <- slow     every sync_period steps

    The order is centralization, RAdam's direction, weight decay, learning rate, Lookahead (arXiv
    1908.03265 and 1907.08610). The defaults are those of lessw2020/Ranger-Deep-Learning-Optimizer.
    Its code keeps the first axis in centralization, where PyTorch has the output features, and adds
    eps to the root of the uncorrected second moment: see
    `optim_zoo.ports.pytorch_optimizer.Ranger`. Without weight decay, ours is
    ``Lookahead(RectifiedAdam(...))`` of TensorFlow Addons, and agrees with it (0.23.0) to 1e-9 in
    float64.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.
      weight_decay: A finite number >= 0. At 0, as a Python number, nothing is decayed.
      sync_period: The number of steps from one synchronization to the next, a whole number >= 1.
      slow_step_size: The share of the way that the slow weights move, in (0, 1].
      threshold: The length rho_t of RAdam's average from which steps are rectified, a number >= 4.
      gradient_centralization: Whether the mean of the gradient of each output feature is
        subtracted, for leaves of two axes or more.
      exclude_from_weight_decay: Path patterns of the leaves that are not decayed. A pattern is a
        regular expression, searched for (``re.search``) in the path of a leaf, such as
        ``encoder/layer_0/bias``.

    Returns:
      A transformation whose state is ``LookaheadState``: the step, the slow weights (like the
      parameters, in float32 or wider), and the tuple of the states of the inner pieces.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``init``, a path pattern matches no
        leaf; in ``update``, the parameters are missing, or a gradient has another shape than its
        parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.ranger(1e-3, gradient_centralization=True)
      ```
    """
    centralized = [centralize_gradients()] if gradient_centralization else []
    inner = optax.chain(
        *centralized,
        scale_by_radam(b1, b2, eps, threshold),
        add_decayed_weights(
            weight_decay, rules.named("exclude_from_weight_decay", exclude_from_weight_decay)
        ),
        scale_by_learning_rate(learning_rate),
    )
    return lookahead(inner, sync_period, slow_step_size)
