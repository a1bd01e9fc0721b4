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
        x  <- x - learning_rate mu_hat / (sqrt(nu_hat) + eps)

    Algorithm 1 of the paper, eps beside the corrected root; Keras and TensorFlow 1 have the
    paper's "epsilon hat" beside the uncorrected one. L2 regularisation, which Adam rescales and
    so is not weight decay, is ``optax.chain(add_decayed_weights(weight_decay), adam(...))``;
    decoupled decay is `adamw`. Agrees with ``torch.optim.Adam`` (2.13.0) to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      b1, b2, eps, bias_correction: see `scale_by_adam`.

    Raises:
      ValueError: see `scale_by_adam` and `scale_by_learning_rate`.
    """
    return optax.chain(
        scale_by_adam(
            b1, b2, eps, bias_correction=bias_correction, eps_root=eps_root, nesterov=nesterov
        ),
        scale_by_learning_rate(learning_rate),
    )
