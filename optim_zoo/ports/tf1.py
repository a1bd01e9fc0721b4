"""Optimizers of ``tf.compat.v1.train`` (TensorFlow 2.21), under its names and with its defaults.

Each agrees with the source to 1e-9 in float64. ``use_locking``, which guards variables against
other threads, must be left at its default; ``name`` is accepted and ignored. Every port raises
`ArgumentValueError` for a number out of its range, and `ArgumentTypeError` for a wrong type.
"""

import optax

from optim_zoo import errors
from optim_zoo.optimizers.adadelta import adadelta
from optim_zoo.optimizers.adagrad import adagrad
from optim_zoo.ports._arguments import Rate, check_momentum, check_nesterov, in_source_words, refuse
from optim_zoo.ports._pieces import chain, rms_inside_momentum, scale_by_adam_epsilon_hat
from optim_zoo.transforms import scale_by_learning_rate
from optim_zoo.transforms.momentum import trace_with_gain


@in_source_words
def AdamOptimizer(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    use_locking: bool = False,
    name: str = "Adam",
    *,
    beta1: float | None = None,
    beta2: float | None = None,
) -> optax.GradientTransformation:
    """Applies Adam with eps added to the uncorrected root, "epsilon hat" in the paper.

    ::

        u = sqrt(c2) / c1 mu / (sqrt(nu) + epsilon),   c1 = 1 - beta_1^t, c2 = 1 - beta_2^t

    Args:
      learning_rate: A number >= 0 or a schedule.
      beta_1, beta_2: The decay rates of the moments, in [0, 1).
      epsilon: The number that is added to the root, >= 0.
      beta1, beta2: The source's own spelling of ``beta_1`` and ``beta_2``.
    """
    refuse("tf1.AdamOptimizer", use_locking=(use_locking, False))
    b1 = beta_1 if beta1 is None else beta1
    b2 = beta_2 if beta2 is None else beta2
    own_names = {"b1": "beta_1" if beta1 is None else "beta1"}
    own_names |= {"b2": "beta_2" if beta2 is None else "beta2"}
    with errors.renaming(own_names):
        direction = scale_by_adam_epsilon_hat(b1, b2, epsilon)
    return chain(direction, scale_by_learning_rate(learning_rate))


@in_source_words
def MomentumOptimizer(
    learning_rate: Rate,
    momentum: float,
    use_locking: bool = False,
    name: str = "Momentum",
    use_nesterov: bool = False,
) -> optax.GradientTransformation:
    """Applies `momentum`, or `nesterov`, with the learning rate outside the momentum.

    Args:
      learning_rate: A number >= 0 or a schedule.
      momentum: The decay rate of the momentum, >= 0, also 1 and above; above 0 with Nesterov's.
      use_nesterov: Looks one step ahead along the momentum.
    """
    refuse("tf1.MomentumOptimizer", use_locking=(use_locking, False))
    check_momentum(momentum)
    if use_nesterov:
        check_nesterov(momentum)
    trace = trace_with_gain("trace_momentum", momentum, lambda count: 1.0, nesterov=use_nesterov)
    return optax.chain(trace, scale_by_learning_rate(learning_rate))


@in_source_words
def RMSPropOptimizer(
    learning_rate: Rate,
    decay: float = 0.9,
    momentum: float = 0.0,
    epsilon: float = 1e-10,
    use_locking: bool = False,
    centered: bool = False,
    name: str = "RMSProp",
) -> optax.GradientTransformation:
    """Applies `rmsprop` whose mean square starts at 1, so that its first steps are small.

    Args:
      learning_rate: A number >= 0 or a schedule.
      decay: The decay rate of the averages, in [0, 1).
      momentum: The decay rate of the momentum, >= 0. 0 keeps no momentum.
      epsilon: The number that is added inside the root, >= 0.
      centered: Subtracts the square of the average gradient from the mean square.
    """
    refuse("tf1.RMSPropOptimizer", use_locking=(use_locking, False))
    return rms_inside_momentum(
        learning_rate, decay, epsilon, momentum, centered=centered, initial_scale=1.0
    )


@in_source_words
def AdagradOptimizer(
    learning_rate: Rate,
    initial_accumulator_value: float = 0.1,
    use_locking: bool = False,
    name: str = "Adagrad",
) -> optax.GradientTransformation:
    """Applies `adagrad` without eps.

    Args:
      learning_rate: A number >= 0 or a schedule.
      initial_accumulator_value: The sum of squares before the first step, >= 0.
    """
    refuse("tf1.AdagradOptimizer", use_locking=(use_locking, False))
    return adagrad(learning_rate, initial_accumulator_value, 0.0)


@in_source_words
def AdadeltaOptimizer(
    learning_rate: Rate = 0.001,
    rho: float = 0.95,
    epsilon: float = 1e-8,
    use_locking: bool = False,
    name: str = "Adadelta",
) -> optax.GradientTransformation:
    """Applies `adadelta`.

    Args:
      learning_rate: A number >= 0 or a schedule.
      rho: The decay rate of both averages, in [0, 1).
      epsilon: The number that is added inside both roots, >= 0.
    """
    refuse("tf1.AdadeltaOptimizer", use_locking=(use_locking, False))
    return adadelta(learning_rate, rho, epsilon)
