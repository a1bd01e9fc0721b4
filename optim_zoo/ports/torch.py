"""``torch.optim`` (2.13.0).

What torch says with parameter groups, those of weight decay 0, is said with
``exclude_from_weight_decay``. ``maximize`` is supported; ``foreach``, ``fused``, ``capturable``
and ``differentiable``, which choose a kernel and no formula, are refused unless left out. Each
agrees with torch to 1e-9 in float64, NAdam to 1e-8, for torch keeps a product in float32.
"""

import optax

from optim_zoo import ranges, rules
from optim_zoo.errors import ArgumentValueError
from optim_zoo.optimizers.adadelta import adadelta
from optim_zoo.ports._arguments import Rate, in_source_words, is_zero, refuse
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
    """L2 regularisation, then `sgd`: the first step is not dampened."""
    refuse("torch.SGD", foreach=(foreach, None), differentiable=(differentiable, False),
           fused=(fused, None))  # fmt: skip
    ranges.check("dampening", dampening)
    if nesterov:
        _check_nesterov(momentum, dampening)
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
    """L2 regularisation, or decoupled decay where told, and `adam` or `amsgrad`."""
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
    """`Adam` with decoupled decay; torch decays first, which is the same number."""
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
    """NAdam with Dozat's schedule of the momentum: `scale_by_scheduled_nadam`."""
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
    """RAdam with eps beside the uncorrected root, and momentum alone below rho = 5."""
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
    """RMSprop with eps outside the root and the learning rate outside the momentum."""
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
    """AdaGrad with eps outside the root and the rate lr / (1 + lr_decay step)."""
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
    """L2 regularisation, then `adadelta`."""
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
    """`lazy_adam` with eps beside the uncorrected root; `SparseRows` are torch's COO gradients."""
    refuse("torch.SparseAdam", maximize=(maximize, False))
    return chain(scale_by_adam_epsilon_hat(*betas, eps, lazy=True), scale_by_learning_rate(lr))


def _check_nesterov(momentum: float, dampening: float) -> None:
    if is_zero(momentum):
        raise ArgumentValueError(
            "nesterov",
            "be False without momentum",
            True,
            "set momentum, such as 0.9",
            sentence="{argument} needs a momentum above 0, got 0: set momentum, such as 0.9",
            related=["momentum"],
        )
    # An array, traced or not, comes from optax.inject_hyperparams.
    if isinstance(dampening, (int, float)) and dampening != 0:
        raise ArgumentValueError(
            "nesterov",
            "be False with dampening",
            True,
            "leave one out",
            sentence=f"{{argument}} cannot be combined with dampening, got {dampening}: "
            "leave one out",
            related=["dampening"],
        )


def _stepping(
    lr: Rate,
    direction: optax.GradientTransformation,
    decay: optax.GradientTransformation,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> optax.GradientTransformation:
    """What torch's Adam, NAdam and RAdam share around their directions."""
    pieces = (direction, decay) if decoupled_weight_decay else (decay, direction)
    return chain(negated(maximize), *pieces, scale_by_learning_rate(lr))
