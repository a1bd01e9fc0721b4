"""Schedules (step -> learning rate, the first step being 0) and batch-size scaling."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges
from optim_zoo.errors import ArgumentValueError

Step = jax.typing.ArrayLike


def constant(learning_rate: float) -> optax.Schedule:
    """The same rate at every step."""
    ranges.check("learning_rate", learning_rate, 0.0, open_high=True)
    return optax.constant_schedule(learning_rate)


def bert_warmup_polynomial(
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    power: float = 1.0,
    end_learning_rate: float = 0.0,
) -> optax.Schedule:
    """Linear warmup, then polynomial decay, exactly as BERT's ``create_optimizer``.

    ::

        s < W:  learning_rate s / W
        else:   (learning_rate - end) (1 - min(s, N) / N)^power + end

    The rate of the first step is 0: the moments move, the parameters do not. The decay's clock
    starts at step 0, not at the end of the warmup, so that the rate drops there by
    ``learning_rate W / N``; `warmup_polynomial` has no drop. Source: google-research/bert
    ``optimization.py``; ALBERT's adds the power.

    Args:
      learning_rate: the rate the warmup aims at.
      warmup_steps: W, may be 0.
      total_steps: N, at least W; the rate stays at ``end_learning_rate`` after it.

    Raises:
      ArgumentTypeError: an argument is not a number.
      ArgumentValueError: an argument is out of range.
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
    """`bert_warmup_polynomial` without the drop: the decay's clock starts after the warmup.

    ::

        s < W:  learning_rate s / W
        else:   (learning_rate - end) (1 - (min(s, N) - W) / (N - W))^power + end
    """
    _check_decay(learning_rate, warmup_steps, total_steps, power, end_learning_rate)
    decay = _polynomial(learning_rate, warmup_steps, total_steps, power, end_learning_rate)
    return _warmup(learning_rate, warmup_steps, decay)


def warmup_cosine(
    learning_rate: float, warmup_steps: int, total_steps: int, end_learning_rate: float = 0.0
) -> optax.Schedule:
    """Linear warmup, then half a cosine (Loshchilov and Hutter, arXiv 1608.03983).

    ::

        s < W:  learning_rate s / W
        else:   end + (learning_rate - end) (1 + cos(pi (min(s, N) - W) / (N - W))) / 2
    """
    _check_decay(learning_rate, warmup_steps, total_steps, 1.0, end_learning_rate)

    def decay(step: jax.Array) -> jax.Array:
        # cos(pi (1 - left)) = -cos(pi left)
        cosine = (1 - jnp.cos(jnp.pi * _share_left(step, warmup_steps, total_steps))) / 2
        return end_learning_rate + (learning_rate - end_learning_rate) * cosine

    return _warmup(learning_rate, warmup_steps, decay)


def _polynomial(
    learning_rate: float, start: int, total_steps: int, power: float, end_learning_rate: float
) -> optax.Schedule:
    def decay(step: jax.Array) -> jax.Array:
        left = _share_left(step, start, total_steps)
        return (learning_rate - end_learning_rate) * left**power + end_learning_rate

    return decay


def _share_left(step: jax.Array, start: int, total_steps: int) -> jax.Array:
    """1 at ``start``, 0 from ``total_steps`` on."""
    # Not 1 - s / N: compiled, that is s times a rounded 1 / N, and below 0 at s = N for some N.
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
        for schedule in (constant, warmup_polynomial, bert_warmup_polynomial, warmup_cosine)
    }
)


class Stage(NamedTuple):
    """A stage of training with its own batch size: its length and its schedule."""

    steps: int
    schedule: optax.Schedule  # of the step counted from the start of the stage


def mixed_batch(stages: Sequence[Stage]) -> optax.Schedule:
    """Stages one after another, each with its own warmup from zero.

    The LAMB paper trains BERT with batch 64k on short sequences, then 32k on long ones, and warms
    up again where the second stage starts, because the problem has changed (arXiv 1904.00962,
    section 4.1, mixed-batch training).

    Raises:
      ArgumentValueError: there is no stage, or one has no steps.
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
    """learning_rate batch_size / base_batch_size (Goyal et al., arXiv 1706.02677)."""
    return learning_rate * _batch_ratio(learning_rate, batch_size, base_batch_size)


def scale_by_square_root(learning_rate: float, batch_size: int, base_batch_size: int) -> float:
    """learning_rate sqrt(batch_size / base_batch_size) (Krizhevsky, arXiv 1404.5997)."""
    return learning_rate * math.sqrt(_batch_ratio(learning_rate, batch_size, base_batch_size))


def _batch_ratio(learning_rate: float, batch_size: int, base_batch_size: int) -> float:
    ranges.check("learning_rate", learning_rate, 0.0, open_high=True)
    ranges.check_count("batch_size", batch_size, 1)
    ranges.check_count("base_batch_size", base_batch_size, 1)
    return batch_size / base_batch_size


class Recipe(NamedTuple):
    """What the LAMB paper sets for a batch size."""

    learning_rate: float
    warmup_ratio: float  # the share of all steps

    def warmup_steps(self, total_steps: int) -> int:
        """The warmup in steps, rounded."""
        return round(self.warmup_ratio * total_steps)


LAMB_BATCH_SIZES = tuple(512 * 2**k for k in range(7))


def lamb_recipe(batch_size: int) -> Recipe:
    """The LAMB paper's recipe for BERT as a function of the batch size.

    ::

        batch size 512 2^k, k = 0..6:
        learning rate = 5 / (2^(3 - k/2) 10^3),   warmup ratio = 2^k / 320

    Square-root scaling of the rate and linear-epoch warmup, from batch 512 to 32,768 without
    tuning (arXiv 1904.00962, table 4).

    Raises:
      ArgumentValueError: the batch size is none of the seven.
    """
    if batch_size not in LAMB_BATCH_SIZES:
        sizes = ", ".join(map(str, LAMB_BATCH_SIZES))
        raise ArgumentValueError(
            "batch_size",
            f"be one of {sizes}",
            batch_size,
            sentence=f"the recipe is for the batch sizes {sizes}, got {batch_size}",
        )
    k = LAMB_BATCH_SIZES.index(batch_size)
    return Recipe(5 / (2 ** (3 - k / 2) * 10**3), 2**k / 320)
