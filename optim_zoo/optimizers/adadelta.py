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

    This is Algorithm 1 of the paper (arXiv 1212.5701) with a learning rate, which is 1 there.
    PyTorch, Keras, TensorFlow and optax use the same formula. It agrees with ``optax.adadelta``
    (0.2.8) to 1e-9 in float64.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      rho: The decay rate of both averages, in [0, 1).
      eps: A finite number > 0. The first steps are proportional to its root.

    Returns:
      A transformation whose state is the tuple of the states of its pieces:
      ``ScaleByAdadeltaState`` (e_g and e_x, like the parameters, in float32 or wider) and
      ``ScaleByLearningRateState`` (the step and the learning rate).

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.adadelta(1.0, rho=0.95)
      ```
    """
    return optax.chain(scale_by_adadelta(rho, eps), scale_by_learning_rate(learning_rate))
