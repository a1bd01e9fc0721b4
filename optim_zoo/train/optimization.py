"""The schedule and the optimizer that a config names."""

import inspect

import optax

from optim_zoo import clip_by_global_norm, registry, rules, schedules
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
            raise ValueError(
                f"warmup_steps must be 0, since the schedule {config.schedule.name} has no warmup, "
                f"got {second.warmup_steps}"
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
