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
    """`lookahead` around `radam`'s direction with decoupled weight decay.

    ::

        g    <- g - mean(g over all axes but the last)         with gradient_centralization
        fast <- fast - learning_rate (radam(g) + weight_decay fast)
        slow <- slow + slow_step_size (fast - slow),  fast <- slow     every sync_period steps

    The order is centralization, RAdam's direction, decay, learning rate, Lookahead. The defaults
    are the author's; his code keeps the first axis in centralization, where torch has the output
    features (`centralize_gradients`), and has eps beside the uncorrected root. With no decay this
    is TensorFlow Addons' ``Lookahead(RectifiedAdam(...))``, its recommended Ranger, and agrees
    with that (0.23.0) to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      b1, b2, eps, threshold: see `scale_by_radam`.
      weight_decay, exclude_from_weight_decay: see `add_decayed_weights`.
      sync_period, slow_step_size: see `lookahead`.
      gradient_centralization: see `centralize_gradients`.

    Raises:
      ValueError: see the pieces.
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
