"""AdaDelta (Zeiler, arXiv 1212.5701)."""

import jax
import optax

from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import scale_by_adadelta, scale_by_learning_rate


@accepts_optax_arguments
def adadelta(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    rho: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-6,
) -> optax.GradientTransformation:
    """Steps in the units of the parameters, from averages of past gradients and past steps.

    ::

        e_g <- rho e_g + (1 - rho) g^2
        u    = sqrt(e_x + eps) / sqrt(e_g + eps) g
        e_x <- rho e_x + (1 - rho) u^2
        x   <- x - learning_rate u

    Algorithm 1 of the paper with a learning rate, which is 1 there. torch, Keras, TensorFlow and
    optax agree on the formula. Agrees with ``optax.adadelta`` (0.2.8) to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      rho, eps: see `scale_by_adadelta`.

    Raises:
      ValueError: see `scale_by_adadelta` and `scale_by_learning_rate`.
    """
    return optax.chain(scale_by_adadelta(rho, eps), scale_by_learning_rate(learning_rate))
