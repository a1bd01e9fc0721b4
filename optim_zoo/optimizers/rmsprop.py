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
    """Divides by the root of the mean square of recent gradients.

    ::

        nu <- decay nu + (1 - decay) g^2,   nu_0 = initial_scale
        m  <- momentum m + learning_rate g / sqrt(nu + eps)
        x  <- x - m

    The learning rate stands inside the momentum, as in ``optax.rmsprop``, Keras and TensorFlow 1
    (which starts nu at 1); torch has it outside: `ports.torch.RMSprop`. Agrees with
    ``optax.rmsprop`` (0.2.8) to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      decay, eps, eps_in_sqrt, initial_scale, centered: see `scale_by_rms`.
      momentum, nesterov: see `trace_momentum`; with ``momentum=None``, m is not stored.

    Raises:
      ValueError: see `scale_by_rms`, `trace_momentum` and `scale_by_learning_rate`.
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
