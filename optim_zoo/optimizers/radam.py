"""RAdam (Liu et al., arXiv 1908.03265)."""

import jax
import optax

from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import scale_by_learning_rate, scale_by_radam


@accepts_optax_arguments
def radam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    threshold: jax.typing.ArrayLike = 5.0,
    *,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformation:
    """Rectifies Adam's steps while its second moments hold few gradients.

    ::

        x <- x - learning_rate r_t (mu / c1) / (sqrt(nu / c2) + eps)   where rho_t >= threshold
        x <- x - learning_rate mu / c1                                 before that
        rho_t = rho_inf - 2 t b2^t / (1 - b2^t),   rho_inf = 2 / (1 - b2) - 1
        r_t   = sqrt((rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t))

    mu, nu, c1 and c2 are those of `adam`. This is Algorithm 2 of the paper (arXiv 1908.03265) with
    the threshold 5 of the authors' code; eps is added to the root of the corrected second moment.
    For every b2 in [0.9, 0.999], the sixth step is the first one that is rectified. It agrees with
    ``optax.radam`` (0.2.8) to 1e-9 in float64.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.
      threshold: The length rho_t of the average from which steps are rectified, a number >= 4.
      eps_root: A finite number >= 0, added under the root. At the default 0, the derivative of a
        root of 0 is taken as 0, so that gradients through the update stay finite.

    Returns:
      A transformation whose state is the tuple of the states of its pieces: ``ScaleByRadamState``
      (the count of steps, mu and nu; the moments are like the parameters, in float32 or wider) and
      ``ScaleByLearningRateState`` (the step and the learning rate).

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.radam(1e-3)
      ```
    """
    return optax.chain(
        scale_by_radam(b1, b2, eps, threshold, eps_root=eps_root),
        scale_by_learning_rate(learning_rate),
    )
