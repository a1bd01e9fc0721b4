"""The schedule and the optimizer that a config names, and the wrappers around the optimizer."""

import inspect

import jax
import optax

from optim_zoo import (
    accumulation,
    clip_by_global_norm,
    guards,
    metrics,
    precision,
    registry,
    rules,
    schedules,
)
from optim_zoo.errors import ArgumentValueError
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


def make_optimizer(config: Config, layers: rules.Rules) -> optax.GradientTransformation:
    """Returns clipping and the optimizer, which receives ``layers`` if it takes them."""
    choice = config.optimizer
    constructor = registry.get(choice.name).constructor
    known = {"layers": layers} if "layers" in inspect.signature(constructor).parameters else {}
    return optax.chain(
        clip_by_global_norm(config.train.clip_norm),
        constructor(make_schedule(config), **choice.arguments, **known),
    )


def wrapped(config: Config, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns ``tx`` inside the wrappers of [precision], [guards] and [accumulation].

    Accumulation is outermost: a guard sees the mean gradient of a step's batches, and a skipped
    step changes neither the master weights nor the random numbers of stochastic rounding.

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
            tx, every, skip_nonfinite=guard.nonfinite, max_consecutive=guard.max_consecutive
        )
    return tx
