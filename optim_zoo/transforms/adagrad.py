"""The direction of AdaGrad (Duchi, Hazan and Singer, JMLR 12, 2011)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optim_zoo import ranges
from optim_zoo.transforms.leafwise import Declaration, Leaf, Leafwise, leafwise, zeros
from optim_zoo.transforms.rms import divide_by_root
from optim_zoo.tree import Tree


class ScaleByAdagradState(NamedTuple):
    """State of `scale_by_adagrad`."""

    sum_of_squares: Tree  # like the parameters, in float32 or wider


def scale_by_adagrad(
    initial_accumulator_value: jax.typing.ArrayLike = 0.1,
    eps: jax.typing.ArrayLike = 1e-7,
    *,
    eps_in_sqrt: bool = True,
) -> Leafwise:
    """Divides each gradient by the root of the sum of all its squares.

    ::

        s <- s + g^2,   s_0 = initial_accumulator_value
        u  = g / sqrt(s + eps)   or, with eps_in_sqrt=False,  g / (sqrt(s) + eps)

    The source is Duchi, Hazan and Singer, JMLR 12, 2011. ``optax.scale_by_rss`` computes the same;
    here s is in float32 or wider whatever the parameters are.

    Args:
      initial_accumulator_value: The sum of squares before the first step, a finite number >= 0.
      eps: A finite number >= 0. Where the root and eps are both 0, u is 0.
      eps_in_sqrt: Whether eps is added under the root, as in optax and Keras, or to the root, as in
        PyTorch.

    Returns:
      A piece that returns the direction u; its state is `ScaleByAdagradState`.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optax.chain(optim_zoo.scale_by_adagrad(0.0), optim_zoo.scale_by_learning_rate(0.01))
      ```
    """
    ranges.check("initial_accumulator_value", initial_accumulator_value, 0.0, open_high=True)
    ranges.check("eps", eps, 0.0, open_high=True)

    def init(path: str, x: jax.Array) -> dict[str, jax.Array]:
        return {"sum_of_squares": jnp.full_like(zeros(x), initial_accumulator_value)}

    def update(
        g: jax.Array, state: ScaleByAdagradState, leaf: Leaf
    ) -> tuple[jax.Array, ScaleByAdagradState]:
        del leaf
        g = g.astype(state.sum_of_squares.dtype)
        s = state.sum_of_squares + jnp.square(g)
        return divide_by_root(g, s, eps, eps_in_sqrt=eps_in_sqrt), state._replace(sum_of_squares=s)

    return leafwise(
        Declaration(
            name="scale_by_adagrad",
            update=update,
            state=ScaleByAdagradState,
            like_params=("sum_of_squares",),
            init=init,
        )
    )
