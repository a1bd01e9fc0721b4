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
    """`adam` whose second moment never falls.

    ::

        mu     <- b1 mu + (1 - b1) g
        nu     <- b2 nu + (1 - b2) g^2
        nu_max <- max(nu_max, nu)
        x      <- x - learning_rate (mu / c1) / (sqrt(nu_max / c2) + eps)

    The maximum is of the uncorrected second moment, as in torch; ``optax.amsgrad`` takes it of the
    corrected one, and is not the same. Algorithm 2 of the paper, which
    has no correction, is ``bias_correction=False``. Agrees with ``torch.optim.Adam(amsgrad=True)``
    (2.13.0) to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      b1, b2, eps, bias_correction: see `scale_by_adam`.

    Raises:
      ValueError: see `scale_by_amsgrad` and `scale_by_learning_rate`.
    """
    return optax.chain(
        scale_by_amsgrad(b1, b2, eps, bias_correction=bias_correction, eps_root=eps_root),
        scale_by_learning_rate(learning_rate),
    )
