"""AMSGrad (Reddi, Kale and Kumar, arXiv 1904.09237)."""

import jax
import optax

from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import scale_by_amsgrad, scale_by_learning_rate


@accepts_optax_arguments
def amsgrad(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    bias_correction: bool = True,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformation:
    """Runs Adam with a second moment that never decreases.

    ::

        mu     <- b1 mu + (1 - b1) g
        nu     <- b2 nu + (1 - b2) g^2
        nu_max <- max(nu_max, nu)
        x      <- x - learning_rate (mu / c1) / (sqrt(nu_max / c2) + eps)
        c1      = 1 - b1^t,  c2 = 1 - b2^t,  t = 1, 2, ...

    The maximum is taken of the uncorrected second moment, as in PyTorch. ``optax.amsgrad`` takes
    the maximum of the corrected one, which gives other numbers. Algorithm 2 of the paper (arXiv
    1904.09237) has no bias correction: it is ``bias_correction=False``.

    It agrees with ``torch.optim.Adam(amsgrad=True)`` (2.13.0) to 1e-9 in float64.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.
      bias_correction: Whether mu and nu are divided by c1 and c2. If False, c1 = c2 = 1.
      eps_root: A finite number >= 0, added under the root. At the default 0, the derivative of a
        root of 0 is taken as 0, so that gradients through the update stay finite.

    Returns:
      A transformation whose state is the tuple of the states of its pieces: ``ScaleByAmsgradState``
      (the count of steps, and mu, nu and nu_max, like the parameters, in float32 or wider) and
      ``ScaleByLearningRateState`` (the step and the learning rate).

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.amsgrad(1e-3)
      ```
    """
    return optax.chain(
        scale_by_amsgrad(b1, b2, eps, bias_correction=bias_correction, eps_root=eps_root),
        scale_by_learning_rate(learning_rate),
    )
