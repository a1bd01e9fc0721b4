"""NAdam (Dozat, Incorporating Nesterov Momentum into Adam, ICLR workshop 2016)."""

import jax
import optax

from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import scale_by_learning_rate, scale_by_nadam


@accepts_optax_arguments
def nadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformation:
    """Runs Adam with Nesterov's momentum.

    ::

        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g^2
        u   = (b1 mu / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps)
        x  <- x - learning_rate u

    This is NAdam (Dozat, ICLR workshop 2016) without its momentum schedule, and it agrees with
    ``optax.nadam`` (0.2.8) to 1e-9 in float64. PyTorch and Keras implement the schedule: see
    `optim_zoo.ports.torch.NAdam` and `optim_zoo.ports.keras.Nadam`.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.
      eps_root: A finite number >= 0, added under the root. At the default 0, the derivative of a
        root of 0 is taken as 0, so that gradients through the update stay finite.

    Returns:
      A transformation whose state is the tuple of the states of its pieces: ``ScaleByNadamState``
      (the count of steps, mu and nu; the moments are like the parameters, in float32 or wider) and
      ``ScaleByLearningRateState`` (the step and the learning rate).

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.nadam(2e-3)
      ```
    """
    return optax.chain(
        scale_by_nadam(b1, b2, eps, eps_root=eps_root), scale_by_learning_rate(learning_rate)
    )
