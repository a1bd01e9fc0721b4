"""Optimizers of ``torch.optim`` (2.13.0), under its names and with its defaults.

Each agrees with torch to 1e-9 in float64; `NAdam` agrees to 1e-8, because torch keeps a product in
float32.

These arguments mean the same for every port:

- ``lr``: the learning rate, a number >= 0 or a schedule: step -> learning rate, the first step
  being 0. torch changes it through a scheduler.
- ``betas``: a pair of the decay rates b1 and b2 of the moments, each in [0, 1).
- ``eps``: the number that is added to the denominator, >= 0.
- ``weight_decay``: the factor of the parameters that is added to the gradient (L2 regularization)
  or, where the port says so, to the direction (decoupled weight decay), >= 0.
- ``exclude_from_weight_decay``: path patterns (``re.search``) of leaves that are not decayed. It
  takes the place of torch's parameter groups with a weight decay of 0.
- ``maximize``: negates the gradients.
- ``foreach``, ``fused``, ``capturable``, ``differentiable``: torch chooses a kernel by them. They
  do not change the formula and must be left at their defaults.

Every port raises `ArgumentValueError` for a number out of its range, `ArgumentTypeError` for a
wrong type, and ``NotImplementedError`` for an unsupported argument that is not its default::

    tx = ports.torch.AdamW(lr=1e-3, weight_decay=0.1, exclude_from_weight_decay=["bias$", "norm"])
"""

import optax

from optim_zoo import ranges, rules
from optim_zoo.optimizers.adadelta import adadelta
from optim_zoo.ports._arguments import Rate, check_nesterov, in_source_words, is_zero, refuse
from optim_zoo.ports._pieces import (
    at,
    chain,
    momentum_trace,
    negated,
    radam_epsilon_hat,
    scale_by_adam_epsilon_hat,
)
from optim_zoo.transforms import (
    ScaleByRadamState,
    add_decayed_weights,
    scale_by_adagrad,
    scale_by_adam,
    scale_by_amsgrad,
    scale_by_learning_rate,
    scale_by_rms,
    scale_by_scheduled_nadam,
)
from optim_zoo.transforms.moments import scale_by_moments


@in_source_words
def SGD(
    lr: Rate = 1e-3,
    momentum: float = 0,
    dampening: float = 0,
    weight_decay: float = 0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    foreach: bool | None = None,
    differentiable: bool = False,
    fused: bool | None = None,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies gradient descent with L2 regularization, momentum, dampening and Nesterov's momentum.

    ::

        g <- g + weight_decay x
        m <- momentum m + (1 - dampening) g     at the first step m <- g; without momentum m = g
        x <- x - lr m                           with nesterov  x - lr (g + momentum m)

    The same as `sgd`, with L2 regularization in front.

    Args:
      momentum: The decay rate of m, >= 0, also 1 and above, as in torch. 0 keeps no momentum.
      dampening: The share of a gradient that is left out of m after the first step; any number.
      nesterov: Looks one step ahead. Requires a momentum above 0 and a dampening of 0.

    Raises:
      ArgumentValueError: A number is out of its range, or ``nesterov`` has no momentum or has
        dampening.
    """
    refuse("torch.SGD", foreach=(foreach, None), differentiable=(differentiable, False),
           fused=(fused, None))  # fmt: skip
    ranges.check("dampening", dampening)
    if nesterov:
        check_nesterov(momentum, dampening)
    trace = momentum_trace(momentum, nesterov=nesterov, dampening=dampening)
    return chain(
        negated(maximize),
        add_decayed_weights(weight_decay, exclude_from_weight_decay),
        optax.chain(*[piece for piece in (trace, scale_by_learning_rate(lr)) if piece]),
    )


@in_source_words
def Adam(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
    amsgrad: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    decoupled_weight_decay: bool = False,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies `adam`, or `amsgrad`, with L2 regularization or with decoupled weight decay.

    Args:
      amsgrad: Divides by the largest second moment, before its bias correction, instead of the
        latest one: `amsgrad`.
      decoupled_weight_decay: Adds ``weight_decay x`` to the direction, as `AdamW`, and not to the
        gradient.
    """
    refuse("torch.Adam", foreach=(foreach, None), capturable=(capturable, False),
           differentiable=(differentiable, False), fused=(fused, None))  # fmt: skip
    direction = (scale_by_amsgrad if amsgrad else scale_by_adam)(*betas, eps)
    decay = add_decayed_weights(weight_decay, exclude_from_weight_decay)
    return _stepping(lr, direction, decay, decoupled_weight_decay, maximize)


@in_source_words
def AdamW(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies `adamw`: Adam with decoupled weight decay.

    torch decays the parameters before the step, which gives the same numbers.

    Args:
      amsgrad: See `Adam`.
    """
    return Adam(
        lr,
        betas,
        eps,
        weight_decay,
        amsgrad,
        foreach=foreach,
        maximize=maximize,
        capturable=capturable,
        differentiable=differentiable,
        fused=fused,
        decoupled_weight_decay=True,
        exclude_from_weight_decay=exclude_from_weight_decay,
    )


@in_source_words
def NAdam(
    lr: Rate = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies NAdam with Dozat's schedule of the momentum: `scale_by_scheduled_nadam`.

    torch keeps the product of the scheduled momenta in float32; it is as wide as the parameters
    here.

    Args:
      momentum_decay: The exponent psi of the schedule b1 (1 - 0.5 0.96^(psi t)), >= 0.
      decoupled_weight_decay: See `Adam`.
    """
    refuse("torch.NAdam", foreach=(foreach, None), capturable=(capturable, False),
           differentiable=(differentiable, False))  # fmt: skip
    direction = scale_by_scheduled_nadam(*betas, eps, momentum_decay=momentum_decay)
    decay = add_decayed_weights(weight_decay, exclude_from_weight_decay)
    return _stepping(lr, direction, decay, decoupled_weight_decay, maximize)


@in_source_words
def RAdam(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
    decoupled_weight_decay: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies RAdam with eps added to the uncorrected root, and momentum alone below rho_t = 5.

    ::

        u = r_t sqrt(c2) / c1 mu / (sqrt(nu) + eps)     where rho_t >= 5
        u = mu / c1                                     elsewhere

    `optim_zoo.radam` adds eps to the corrected root.

    Args:
      decoupled_weight_decay: See `Adam`.
    """
    refuse("torch.RAdam", foreach=(foreach, None), capturable=(capturable, False),
           differentiable=(differentiable, False))  # fmt: skip
    hat = radam_epsilon_hat(*betas, eps)
    direction = scale_by_moments("RAdam", hat, *betas, eps, state=ScaleByRadamState)
    decay = add_decayed_weights(weight_decay, exclude_from_weight_decay)
    return _stepping(lr, direction, decay, decoupled_weight_decay, maximize)


@in_source_words
def RMSprop(
    lr: Rate = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0,
    momentum: float = 0,
    centered: bool = False,
    capturable: bool = False,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    *,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies RMSprop with eps outside the root and the learning rate outside the momentum.

    ::

        nu <- alpha nu + (1 - alpha) g^2
        m  <- momentum m + g / (sqrt(nu) + eps)     centered: sqrt(nu - mu^2), mu the average of g
        x  <- x - lr m

    `optim_zoo.rmsprop` has eps inside the root and the learning rate inside the momentum.

    Args:
      alpha: The decay rate of the averages, in [0, 1).
      momentum: The decay rate of m, >= 0. 0 keeps no momentum.
      centered: Subtracts the square of the average gradient from nu.
    """
    refuse("torch.RMSprop", foreach=(foreach, None), capturable=(capturable, False),
           differentiable=(differentiable, False))  # fmt: skip
    return chain(
        negated(maximize),
        add_decayed_weights(weight_decay, exclude_from_weight_decay),
        scale_by_rms(alpha, eps, eps_in_sqrt=False, centered=centered),
        momentum_trace(momentum),
        scale_by_learning_rate(lr),
    )


@in_source_words
def Adagrad(
    lr: Rate = 1e-2,
    lr_decay: float = 0,
    weight_decay: float = 0,
    initial_accumulator_value: float = 0,
    eps: float = 1e-10,
    foreach: bool | None = None,
    *,
    maximize: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies AdaGrad with eps outside the root and a decaying learning rate.

    ::

        s <- s + g^2,   s_0 = initial_accumulator_value
        x <- x - lr / (1 + lr_decay step) g / (sqrt(s) + eps)     where the first step is 0

    `optim_zoo.adagrad` has eps inside the root.

    Args:
      lr_decay: How fast the learning rate decays, >= 0.
      initial_accumulator_value: The sum of squares before the first step, >= 0.
    """
    refuse("torch.Adagrad", foreach=(foreach, None), differentiable=(differentiable, False),
           fused=(fused, None))  # fmt: skip
    ranges.check("lr_decay", lr_decay, 0.0, open_high=True)
    ranges.check_learning_rate(lr)
    rate = lr if is_zero(lr_decay) else (lambda count: at(lr, count) / (1 + count * lr_decay))
    return chain(
        negated(maximize),
        add_decayed_weights(weight_decay, exclude_from_weight_decay),
        scale_by_adagrad(initial_accumulator_value, eps, eps_in_sqrt=False),
        scale_by_learning_rate(rate),
    )


@in_source_words
def Adadelta(
    lr: Rate = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0,
    foreach: bool | None = None,
    *,
    capturable: bool = False,
    maximize: bool = False,
    differentiable: bool = False,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies `adadelta` with L2 regularization.

    Args:
      rho: The decay rate of both averages, in [0, 1).
    """
    refuse("torch.Adadelta", foreach=(foreach, None), capturable=(capturable, False),
           differentiable=(differentiable, False))  # fmt: skip
    return chain(
        negated(maximize),
        add_decayed_weights(weight_decay, exclude_from_weight_decay),
        adadelta(lr, rho, eps),
    )


@in_source_words
def SparseAdam(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    maximize: bool = False,
) -> optax.GradientTransformation:
    """Applies `lazy_adam` with eps added to the uncorrected root.

    `SparseRows` take the place of torch's sparse COO gradients: only their rows of the moments and
    of the parameters move. ``maximize`` is not supported here.
    """
    refuse("torch.SparseAdam", maximize=(maximize, False))
    return chain(scale_by_adam_epsilon_hat(*betas, eps, lazy=True), scale_by_learning_rate(lr))


def _stepping(
    lr: Rate,
    direction: optax.GradientTransformation,
    decay: optax.GradientTransformation,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> optax.GradientTransformation:
    """Returns the chain that torch's Adam, NAdam and RAdam share around their directions."""
    pieces = (direction, decay) if decoupled_weight_decay else (decay, direction)
    return chain(negated(maximize), *pieces, scale_by_learning_rate(lr))
