"""The schedule and the optimizer that a config names, and what stands around the optimizer."""

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
from optim_zoo.train.config import Config


def make_schedule(config: Config) -> optax.Schedule:
    """The schedule of all stages: step -> learning rate."""
    return schedules.mixed_batch(
        [
            schedules.Stage(stage.steps, stage_schedule(config, index))
            for index, stage in enumerate(config.stages)
        ]
    )


def stage_schedule(config: Config, index: int) -> optax.Schedule:
    """The schedule of one stage: step of that stage -> learning rate."""
    constructor = schedules.SCHEDULES[config.schedule.name]
    takes = inspect.signature(constructor).parameters
    arguments = dict(config.schedule.arguments)
    if index > 0:
        second = config.second_stage
        own = {"learning_rate": second.learning_rate, "warmup_steps": second.warmup_steps}
        if second.warmup_steps and "warmup_steps" not in takes:
            expected = f"be 0, since the schedule {config.schedule.name} has no warmup,"
            raise ArgumentValueError(
                "warmup_steps",
                "be 0 with a schedule that has no warmup",
                second.warmup_steps,
                sentence=f"{{argument}} must {expected} got {second.warmup_steps}",
            )
        arguments |= {key: value for key, value in own.items() if key in takes}
    if "total_steps" in takes:
        arguments["total_steps"] = config.stages[index].steps
    return constructor(**arguments)


def make_optimizer(config: Config, layers: rules.Rules) -> optax.GradientTransformation:
    """Clipping and the optimizer; ``layers`` reach an optimizer that knows of layers."""
    choice = config.optimizer
    constructor = registry.get(choice.name).constructor
    known = {"layers": layers} if "layers" in inspect.signature(constructor).parameters else {}
    return optax.chain(
        clip_by_global_norm(config.train.clip_norm),
        constructor(make_schedule(config), **choice.arguments, **known),
    )


def wrapped(config: Config, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """``tx`` behind the wrappers of [precision], [guards] and [accumulation], the last outermost.

    So a guard sees the mean of the batches of a step, and a refused step moves neither master
    weights nor the random numbers of rounding.

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
    told = config.guards
    if told.spikes:
        tx = guards.skip_spikes(tx, told.window, told.factor, max_consecutive=told.max_consecutive)
    elif told.nonfinite:
        tx = guards.skip_nonfinite(tx, told.max_consecutive)
    every = config.accumulation.every
    if every > 1:
        tx = accumulation.accumulate(
            tx, every, skip_nonfinite=told.nonfinite, max_consecutive=told.max_consecutive
        )
    return tx
