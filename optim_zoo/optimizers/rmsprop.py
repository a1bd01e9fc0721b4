"""RMSprop (Tieleman and Hinton, Coursera lecture 6.5, 2012)."""

import jax
import optax

from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import (
    cast_like_params,
    scale_by_learning_rate,
    scale_by_rms,
)
from optim_zoo.transforms.momentum import trace_if_set


@accepts_optax_arguments
def rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    eps_in_sqrt: bool = True,
    initial_scale: jax.typing.ArrayLike = 0.0,
    centered: bool = False,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Divides each gradient by the root of the mean square of recent gradients.

    ::

        nu <- decay nu + (1 - decay) g^2,   nu_0 = initial_scale
        d   = learning_rate g / sqrt(nu + eps)
        m  <- momentum m + d
        x  <- x - m                 with nesterov  x <- x - (momentum m + d)

    The learning rate is inside the momentum, as in ``optax.rmsprop``, Keras and TensorFlow 1 (which
    starts nu at 1). PyTorch applies it after the momentum: see `optim_zoo.ports.torch.RMSprop`. The
    source is Tieleman and Hinton, Coursera lecture 6.5, 2012. It agrees with ``optax.rmsprop``
    (0.2.8) to 1e-9 in float64.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      decay: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0. Where the root and eps are both 0, d is 0.
      eps_in_sqrt: Whether eps is added under the root, as in optax, Keras and TensorFlow, or to the
        root, as in PyTorch.
      initial_scale: The value of nu before the first step, a finite number >= 0.
      centered: Whether the variance nu - mu^2 takes the place of nu, where mu is the moving average
        of g with the same decay rate.
      momentum: The decay rate of m, in [0, 1), or None, where m is d and is not stored. Every
        number stores m, also 0, so that the structure of the state does not depend on tracing.
      nesterov: Whether the update looks one step ahead along the momentum. Needs a momentum above
        0.

    Returns:
      A transformation whose state is the tuple of the states of its pieces: ``ScaleByRmsState`` (nu
      and, if centered, mu, like the parameters, in float32 or wider) and
      ``ScaleByLearningRateState`` (the step and the learning rate). With momentum,
      ``TraceMomentumState`` (the count of steps and m) and an empty state follow.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.rmsprop(1e-3, momentum=0.9)
      ```
    """
    trace = trace_if_set(momentum, nesterov=nesterov)
    rms = scale_by_rms(
        decay, eps, eps_in_sqrt=eps_in_sqrt, initial_scale=initial_scale, centered=centered
    )
    if not trace:
        return optax.chain(rms, scale_by_learning_rate(learning_rate))
    return optax.chain(
        rms,
        scale_by_learning_rate(learning_rate, last=False),
        *trace,
        cast_like_params(),
    )
