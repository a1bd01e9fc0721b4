"""The schedule and the optimizer that a config names, and the wrappers around the optimizer."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from optim_zoo import (
    accumulation,
    averaging,
    catalogue,
    clip_by_global_norm,
    guards,
    metrics,
    precision,
    ranges,
    registry,
    rules,
    schedules,
)
from optim_zoo.errors import ArgumentValueError
from optim_zoo.train import by_path
from optim_zoo.train.config import Config, Stage


def make_schedule(config: Config) -> optax.Schedule:
    """Returns the schedule of all stages: step -> learning rate."""
    return schedules.mixed_batch(
        [schedules.Stage(stage.steps, stage_schedule(config, stage)) for stage in config.stages]
    )


def stage_schedule(config: Config, stage: Stage) -> optax.Schedule:
    """Returns the schedule of one stage: step of that stage -> learning rate."""
    constructor = schedules.SCHEDULES[config.schedule.name]
    arguments = dict(stage.schedule)
    if "total_steps" in inspect.signature(constructor).parameters:
        arguments["total_steps"] = stage.steps
    return constructor(**arguments)


LEARNING_RATE_NAMES = ("learning_rate", "lr")  # how optimizers and ports name it
_WRAPPED_NAMES = ("optimizer", "base_optimizer")  # the first argument of a port that wraps another


def short_name(name: Any) -> Any:
    """Returns ``torch.AdamW`` for ``ports.torch.AdamW``; anything but a string unchanged."""
    return catalogue.short_name(name) if isinstance(name, str) else name


def find_optimizer(name: Any) -> Callable[..., optax.GradientTransformation]:
    """Returns the constructor of an optimizer or a port, such as ``lamb`` or ``torch.AdamW``.

    Raises:
      ArgumentValueError: there is none of this name, or a config cannot use it because it wraps
        another optimizer or has a schedule of its own.
    """
    short = short_name(name)
    ports = {
        f"{library}.{port}": constructor
        for library, made in catalogue.libraries().items()
        for port, constructor in made.items()
    }
    if short in registry.OPTIMIZERS:
        entry = registry.get(short)
        constructor, wraps = entry.constructor, entry.wraps
    elif short in ports:
        constructor = ports[short]
        wraps = next(iter(inspect.signature(constructor).parameters)) in _WRAPPED_NAMES
    else:
        wanted = str(short).casefold()
        alike = [port for port in ports if port.casefold().endswith(f".{wanted}")]
        own = wanted in registry.OPTIMIZERS or not alike
        known = ports if "." in wanted else registry.OPTIMIZERS if own else alike
        ranges.check_choice("optimizer", short, known, argument="name")
        raise AssertionError("unreachable: an optimizer of this name was found above")
    advice = "name an optimizer that wraps no other, such as ranger or lamb"
    if wraps:
        raise ArgumentValueError(
            "name",
            "be an optimizer that wraps no other transformation",
            name,
            advice,
            sentence=f"{name} wraps another transformation, which a config cannot express: "
            f"{advice}",
        )
    if _learning_rate_name(constructor) is None:
        expected = "be an optimizer whose learning rate is an argument"
        raise ArgumentValueError("name", expected, name, f"{name} makes a schedule of its own")
    return constructor


def _learning_rate_name(constructor: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(constructor).parameters
    return next((name for name in LEARNING_RATE_NAMES if name in parameters), None)


def make_optimizer(config: Config, layers: rules.Rules) -> optax.GradientTransformation:
    """Returns the optimizer after clipping, with its learning rates by path and frozen parameters.

    The optimizer receives ``layers`` if it has that argument.
    """
    choice, arguments = config.optimizer, dict(config.optimizer.arguments)
    keys = by_path.ByPath(**{key: arguments.pop(key) for key in by_path.KEYS if key in arguments})
    constructor = find_optimizer(choice.name)
    known = {"layers": layers} if "layers" in inspect.signature(constructor).parameters else {}
    rate = {str(_learning_rate_name(constructor)): make_schedule(config)}
    tx = optax.chain(
        clip_by_global_norm(config.train.clip_norm), constructor(**rate, **arguments, **known)
    )
    return by_path.apply(tx, keys, layers)


def wrapped(config: Config, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns ``tx`` inside the wrappers of [precision], [averaging], [guards] and [accumulation].

    The average is that of the float32 master weights where there are any. Accumulation is
    outermost: a guard sees the mean gradient of a step's batches, and a skipped step changes
    neither the master weights nor the average nor the random numbers of stochastic rounding.

    Raises:
      ArgumentValueError: a dtype in ``precision.state`` is not allowed for its field.
    """
    tx = metrics.with_metrics(tx)
    if config.precision.state:
        try:
            tx = precision.store_state(tx, config.precision.state, seed=config.run.seed)
        except ArgumentValueError as error:
            raise error.renamed("state") from None  # the key of the config
    if config.precision.parameters != "float32":
        tx = {
            "master_weights": precision.master_weights,
            "stochastic_rounding": lambda tx: precision.stochastic_rounding(
                tx, jax.random.key(config.run.seed)
            ),
            "none": lambda tx: tx,
        }[config.precision.wrapper](tx)
    if config.averaging.decay:
        tx = averaging.average_parameters(tx, config.averaging.decay, debias=True)
    guard = config.guards
    if guard.spikes:
        tx = guards.skip_spikes(
            tx, guard.window, guard.factor, max_consecutive=guard.max_consecutive
        )
    elif guard.nonfinite:
        tx = guards.skip_nonfinite(tx, guard.max_consecutive)
    every = config.accumulation.every
    if every > 1:
        tx = accumulation.accumulate(
            tx,
            every,
            skip_nonfinite=guard.nonfinite,
            max_consecutive=guard.max_consecutive,
            noise_scale=config.train.noise_scale,
        )
    return tx
