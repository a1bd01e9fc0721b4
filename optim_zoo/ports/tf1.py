"""``tf.compat.v1.train`` of TensorFlow 2.21.

``use_locking``, which guards variables against other threads, is refused unless left out; ``name``
changes nothing. Each agrees with the source to 1e-9 in float64.
"""

import optax

from optim_zoo import errors
from optim_zoo.optimizers.adadelta import adadelta
from optim_zoo.optimizers.adagrad import adagrad
from optim_zoo.ports._arguments import Rate, check_momentum, in_source_words, refuse
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
    """Adam with eps beside the uncorrected root, the paper's "epsilon hat".

    ``beta1`` and ``beta2`` are the source's own spelling of ``beta_1`` and ``beta_2``.
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
    """`momentum`, or `nesterov`: the learning rate stands outside."""
    refuse("tf1.MomentumOptimizer", use_locking=(use_locking, False))
    check_momentum(momentum)
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
    """`rmsprop` whose mean square starts at 1: small steps at first."""
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
    """`adagrad` without eps."""
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
    """`adadelta`."""
    refuse("tf1.AdadeltaOptimizer", use_locking=(use_locking, False))
    return adadelta(learning_rate, rho, epsilon)
