"""Adam (Kingma and Ba, arXiv 1412.6980)."""

import jax
import optax

from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import scale_by_adam, scale_by_learning_rate


@accepts_optax_arguments
def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    bias_correction: bool = True,
    eps_root: jax.typing.ArrayLike = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Divides the mean of recent gradients by the root of their mean square.

    ::

        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g^2
        x  <- x - learning_rate (mu / c1) / (sqrt(nu / c2) + eps),   c1 = 1 - b1^t, c2 = 1 - b2^t

    This is Algorithm 1 of the paper (arXiv 1412.6980): eps is added to the root of the corrected
    second moment. Keras and TensorFlow 1 add the paper's "epsilon hat" to the root of the
    uncorrected one: see `optim_zoo.ports.keras.Adam`.

    For decoupled weight decay, use `adamw`. L2 regularization, which Adam rescales and which
    therefore is not weight decay, is ``optax.chain(add_decayed_weights(weight_decay), adam(...))``.

    It agrees with ``torch.optim.Adam`` (2.13.0) to 1e-9 in float64. The steps t = 1, 2, ... are
    counted in int32.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.
      bias_correction: Whether mu and nu are divided by c1 and c2. If False, c1 = c2 = 1.
      eps_root: A finite number >= 0, added under the root. At the default 0, the derivative of a
        root of 0 is taken as 0, so that gradients through the update stay finite.
      nesterov: Whether the momentum is Nesterov's, as in `nadam`. Needs ``bias_correction=True``.

    Returns:
      A transformation whose state is the tuple of the states of its pieces: ``ScaleByAdamState``
      (the count of steps, mu and nu; the moments are like the parameters, in float32 or wider) and
      ``ScaleByLearningRateState`` (the step and the learning rate).

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.adam(1e-3, b2=0.98)
      ```
    """
    return optax.chain(
        scale_by_adam(
            b1, b2, eps, bias_correction=bias_correction, eps_root=eps_root, nesterov=nesterov
        ),
        scale_by_learning_rate(learning_rate),
    )
