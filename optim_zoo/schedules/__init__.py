"""Learning-rate schedules (step -> rate, where the first step is 0) and batch-size scaling."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges
from optim_zoo.errors import ArgumentValueError
from optim_zoo.schedules.recipes import LAMB_BATCH_SIZES as LAMB_BATCH_SIZES
from optim_zoo.schedules.recipes import Recipe as Recipe
from optim_zoo.schedules.recipes import lamb_recipe as lamb_recipe

Step = jax.typing.ArrayLike  # a whole number, known or traced; the first step is 0


def constant(learning_rate: float) -> optax.Schedule:
    """Returns the same learning rate at every step.

    Args:
      learning_rate: A finite number >= 0.

    Returns:
      A function from the step to the learning rate.

    Raises:
      ArgumentTypeError: ``learning_rate`` is not a number.
      ArgumentValueError: ``learning_rate`` is negative or not finite.

    Example:
      ```python
      tx = optim_zoo.lamb(optim_zoo.schedules.constant(1e-3))
      ```
    """
    ranges.check("learning_rate", learning_rate, 0.0, open_high=True)
    return optax.constant_schedule(learning_rate)


def bert_warmup_polynomial(
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    power: float = 1.0,
    end_learning_rate: float = 0.0,
) -> optax.Schedule:
    """Warms up linearly, then decays polynomially, exactly as BERT's ``create_optimizer``.

    ::

        s < W:  learning_rate s / W
        else:   (learning_rate - end) (1 - min(s, N) / N)^power + end

    The rate of the first step is 0: the moments change, but the parameters do not. The decay is
    counted from step 0 and not from the end of the warmup, so that the rate drops by
    ``learning_rate W / N`` at the end of the warmup; `warmup_polynomial` has no drop. The source is
    ``optimization.py`` of google-research/bert; the power is from that of ALBERT.

    Args:
      learning_rate: The learning rate at the end of the warmup, a finite number >= 0.
      warmup_steps: W, the number of steps of the warmup, a whole number >= 0.
      total_steps: N, the step at which the decay ends, a whole number >= 1 and >= W. The rate stays
        constant after it.
      power: The exponent of the decay, a number > 0; 1 is a linear decay.
      end_learning_rate: The rate at the end of the decay, a finite number >= 0.

    Returns:
      A function from the step to the learning rate.

    Raises:
      ArgumentTypeError: An argument is not a number, or a number of steps is not a whole number.
      ArgumentValueError: An argument is out of its range, or ``warmup_steps`` is above
        ``total_steps``.

    Example:
      ```python
      schedule = optim_zoo.schedules.bert_warmup_polynomial(1e-4, warmup_steps=10, total_steps=100)
      tx = optim_zoo.bert_adamw(schedule)
      ```
    """
    _check_decay(learning_rate, warmup_steps, total_steps, power, end_learning_rate)
    decay = _polynomial(learning_rate, 0, total_steps, power, end_learning_rate)
    return _warmup(learning_rate, warmup_steps, decay)


def warmup_polynomial(
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    power: float = 1.0,
    end_learning_rate: float = 0.0,
) -> optax.Schedule:
    """Warms up linearly, then decays polynomially from the end of the warmup.

    ::

        s < W:  learning_rate s / W
        else:   (learning_rate - end) (1 - (min(s, N) - W) / (N - W))^power + end

    It differs from `bert_warmup_polynomial` in that the decay is counted from the end of the
    warmup, so that the rate does not drop there.

    Args:
      learning_rate: The learning rate at the end of the warmup, a finite number >= 0.
      warmup_steps: W, the number of steps of the warmup, a whole number >= 0.
      total_steps: N, the step at which the decay ends, a whole number >= 1 and >= W. The rate stays
        constant after it.
      power: The exponent of the decay, a number > 0; 1 is a linear decay.
      end_learning_rate: The rate at the end of the decay, a finite number >= 0.

    Returns:
      A function from the step to the learning rate.

    Raises:
      ArgumentTypeError: An argument is not a number, or a number of steps is not a whole number.
      ArgumentValueError: An argument is out of its range, or ``warmup_steps`` is above
        ``total_steps``.

    Example:
      ```python
      schedule = optim_zoo.schedules.warmup_polynomial(1e-3, warmup_steps=10, total_steps=100)
      tx = optim_zoo.lamb(schedule)
      ```
    """
    _check_decay(learning_rate, warmup_steps, total_steps, power, end_learning_rate)
    decay = _polynomial(learning_rate, warmup_steps, total_steps, power, end_learning_rate)
    return _warmup(learning_rate, warmup_steps, decay)


def warmup_cosine(
    learning_rate: float, warmup_steps: int, total_steps: int, end_learning_rate: float = 0.0
) -> optax.Schedule:
    """Warms up linearly, then decays by half a cosine (arXiv 1608.03983).

    ::

        s < W:  learning_rate s / W
        else:   end + (learning_rate - end) (1 + cos(pi (min(s, N) - W) / (N - W))) / 2

    Args:
      learning_rate: The learning rate at the end of the warmup, a finite number >= 0.
      warmup_steps: W, the number of steps of the warmup, a whole number >= 0.
      total_steps: N, the step at which the decay ends, a whole number >= 1 and >= W. The rate stays
        constant after it.
      end_learning_rate: The rate at the end of the decay, a finite number >= 0.

    Returns:
      A function from the step to the learning rate.

    Raises:
      ArgumentTypeError: An argument is not a number, or a number of steps is not a whole number.
      ArgumentValueError: An argument is out of its range, or ``warmup_steps`` is above
        ``total_steps``.

    Example:
      ```python
      schedule = optim_zoo.schedules.warmup_cosine(1e-3, warmup_steps=10, total_steps=100)
      tx = optim_zoo.adamw(schedule)
      ```
    """
    _check_decay(learning_rate, warmup_steps, total_steps, 1.0, end_learning_rate)

    def decay(step: jax.Array) -> jax.Array:
        # cos(pi (1 - left)) = -cos(pi left)
        cosine = (1 - jnp.cos(jnp.pi * _share_left(step, warmup_steps, total_steps))) / 2
        return end_learning_rate + (learning_rate - end_learning_rate) * cosine

    return _warmup(learning_rate, warmup_steps, decay)


def exponential(learning_rate: float, end_learning_rate: float, total_steps: int) -> optax.Schedule:
    """Changes the learning rate by the same factor at every step.

    ::

        learning_rate (end / learning_rate)^(min(s, N - 1) / (N - 1))

    ``optim-zoo lr-find`` raises the rate in this way, as in the range test of arXiv 1506.01186.

    Args:
      learning_rate: The rate of the first step, a finite number > 0.
      end_learning_rate: The rate of step N - 1 and of all later steps, a finite number > 0.
      total_steps: N, a whole number >= 2.

    Returns:
      A function from the step to the learning rate.

    Raises:
      ArgumentTypeError: A rate is not a number, or ``total_steps`` is not a whole number.
      ArgumentValueError: An argument is out of its range.

    Example:
      ```python
      schedule = optim_zoo.schedules.exponential(1e-5, 1.0, total_steps=100)
      tx = optim_zoo.sgd(schedule)
      ```
    """
    ranges.check("learning_rate", learning_rate, 0.0, open_low=True, open_high=True)
    ranges.check("end_learning_rate", end_learning_rate, 0.0, open_low=True, open_high=True)
    ranges.check_count("total_steps", total_steps, 2)
    start, end = jnp.log(jnp.float32(learning_rate)), jnp.log(jnp.float32(end_learning_rate))

    def schedule(step: Step) -> jax.Array:
        share = jnp.minimum(step, total_steps - 1) / (total_steps - 1)
        return jnp.exp(start + (end - start) * share)

    return schedule


def _polynomial(
    learning_rate: float, start: int, total_steps: int, power: float, end_learning_rate: float
) -> optax.Schedule:
    def decay(step: jax.Array) -> jax.Array:
        left = _share_left(step, start, total_steps)
        return (learning_rate - end_learning_rate) * left**power + end_learning_rate

    return decay


def _share_left(step: jax.Array, start: int, total_steps: int) -> jax.Array:
    """Returns the share of the decay that is left: 1 at ``start``, 0 from ``total_steps`` on."""
    # Not 1 - s / N: XLA multiplies s by a rounded 1 / N, which is below 0 at s = N for some N.
    return (total_steps - jnp.clip(step, start, total_steps)) / max(total_steps - start, 1)


def _warmup(learning_rate: float, warmup_steps: int, decay: optax.Schedule) -> optax.Schedule:
    def schedule(step: Step) -> jax.Array:
        step = jnp.asarray(step)
        rising = learning_rate * step / max(warmup_steps, 1)
        return jnp.where(step < warmup_steps, rising, decay(step))

    return schedule


def _check_decay(
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    power: float,
    end_learning_rate: float,
) -> None:
    ranges.check("learning_rate", learning_rate, 0.0, open_high=True)
    ranges.check("end_learning_rate", end_learning_rate, 0.0, open_high=True)
    ranges.check("power", power, 0.0, open_low=True)
    ranges.check_count("warmup_steps", warmup_steps)
    ranges.check_count("total_steps", total_steps, 1)
    if warmup_steps > total_steps:
        raise ArgumentValueError(
            "warmup_steps",
            "be at most total_steps",
            warmup_steps,
            sentence=f"{{argument}} must be at most total_steps, got {warmup_steps} of "
            f"{total_steps}",
            related=["total_steps"],
        )


SCHEDULES: Mapping[str, Callable[..., optax.Schedule]] = MappingProxyType(
    {
        schedule.__name__: schedule
        for schedule in (
            constant,
            warmup_polynomial,
            bert_warmup_polynomial,
            warmup_cosine,
            exponential,
        )
    }
)


class Stage(NamedTuple):
    """A stage of training, with its own batch size and schedule."""

    steps: int  # its length, >= 1
    schedule: optax.Schedule  # of the step, counted from the start of the stage


def mixed_batch(stages: Sequence[Stage]) -> optax.Schedule:
    """Joins the schedules of stages, each with its own warmup from zero.

    The LAMB paper trains BERT with batches of 64k short sequences, then with batches of 32k long
    ones. It warms up again at the start of the second stage, because the problem has changed (arXiv
    1904.00962, section 4.1, mixed-batch training).

    Args:
      stages: The stages in their order.

    Returns:
      A function from the step to the learning rate.

    Raises:
      ArgumentValueError: There is no stage, or a stage has no steps.

    Example:
      ```python
      stages = [
          optim_zoo.schedules.Stage(90, optim_zoo.schedules.warmup_polynomial(1e-3, 10, 90)),
          optim_zoo.schedules.Stage(10, optim_zoo.schedules.warmup_polynomial(5e-4, 2, 10)),
      ]
      tx = optim_zoo.lamb(optim_zoo.schedules.mixed_batch(stages))
      ```
    """
    if not stages:
        raise ArgumentValueError(
            "stages",
            "hold at least one stage",
            stages,
            sentence="mixed_batch needs at least one stage, got none",
        )
    for stage in stages:
        ranges.check_count("steps", stage.steps)
        if stage.steps < 1:
            raise ArgumentValueError(
                "stages",
                "have steps >= 1 in every stage",
                stage.steps,
                sentence=f"steps of a stage must be >= 1, got {stage.steps}",
            )
    ends = [sum(stage.steps for stage in stages[:i]) for i in range(1, len(stages))]
    return optax.join_schedules([stage.schedule for stage in stages], ends)


def scale_linearly(learning_rate: float, batch_size: int, base_batch_size: int) -> float:
    """Scales a learning rate in proportion to the batch size (arXiv 1706.02677).

    ::

        learning_rate batch_size / base_batch_size

    Args:
      learning_rate: The learning rate that was tuned at ``base_batch_size``, a finite number >= 0.
      batch_size: The batch size to train with, a whole number >= 1.
      base_batch_size: The batch size of ``learning_rate``, a whole number >= 1.

    Returns:
      The scaled learning rate.

    Raises:
      ArgumentTypeError: An argument is not a number, or a batch size is not a whole number.
      ArgumentValueError: An argument is out of its range.

    Example:
      ```python
      rate = optim_zoo.schedules.scale_linearly(0.1, batch_size=8192, base_batch_size=256)
      tx = optim_zoo.sgd(rate)
      ```
    """
    return learning_rate * _batch_ratio(learning_rate, batch_size, base_batch_size)


def scale_by_square_root(learning_rate: float, batch_size: int, base_batch_size: int) -> float:
    """Scales a learning rate by the square root of the batch size (arXiv 1404.5997).

    ::

        learning_rate sqrt(batch_size / base_batch_size)

    Args:
      learning_rate: The learning rate that was tuned at ``base_batch_size``, a finite number >= 0.
      batch_size: The batch size to train with, a whole number >= 1.
      base_batch_size: The batch size of ``learning_rate``, a whole number >= 1.

    Returns:
      The scaled learning rate.

    Raises:
      ArgumentTypeError: An argument is not a number, or a batch size is not a whole number.
      ArgumentValueError: An argument is out of its range.

    Example:
      ```python
      rate = optim_zoo.schedules.scale_by_square_root(1e-3, batch_size=8192, base_batch_size=512)
      tx = optim_zoo.lamb(rate)
      ```
    """
    return learning_rate * math.sqrt(_batch_ratio(learning_rate, batch_size, base_batch_size))


def _batch_ratio(learning_rate: float, batch_size: int, base_batch_size: int) -> float:
    ranges.check("learning_rate", learning_rate, 0.0, open_high=True)
    ranges.check_count("batch_size", batch_size, 1)
    ranges.check_count("base_batch_size", base_batch_size, 1)
    return batch_size / base_batch_size
