import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import schedules

# A few roundings: schedules are evaluated in float32.
RTOL = 5e-7


def _values(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """Returns the first ``steps`` learning rates, compiled; checks that eager ones are the same."""
    traced = np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)))
    eager = np.asarray([schedule(step) for step in range(steps)])
    np.testing.assert_allclose(traced, eager, rtol=RTOL)
    return traced


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(("warmup", "total"), [(4, 16), (0, 9), (1, 3), (5, 5)])
def test_bert_warmup_polynomial_follows_the_code_of_bert(
    power: float, warmup: int, total: int
) -> None:
    """Compares with a loop that follows ``optimization.py`` of google-research/bert."""
    peak, end = 0.01, 0.001
    expected = []
    for step in range(total + 5):
        decayed = (peak - end) * (1 - min(step, total) / total) ** power + end
        expected.append(peak * (step / warmup) if step < warmup else decayed)
    schedule = schedules.bert_warmup_polynomial(peak, warmup, total, power, end)
    np.testing.assert_allclose(_values(schedule, total + 5), expected, rtol=RTOL)


def test_the_learning_rate_of_bert_starts_at_0_and_drops_after_the_warmup() -> None:
    values = _values(schedules.bert_warmup_polynomial(1.0, 4, 16), 20)
    assert values[0] == 0
    assert values[3] == 0.75
    assert values[4] == 0.75  # it would be 1 without the drop by W / N = 1/4
    assert (values[16:] == 0).all()


def test_warmup_polynomial_reaches_the_peak_without_a_drop() -> None:
    values = _values(schedules.warmup_polynomial(1.0, 4, 16, end_learning_rate=0.25), 20)
    np.testing.assert_allclose(values[:5], [0, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(values[4:17], 1 - 0.75 * np.arange(13) / 12, rtol=RTOL)
    assert (values[16:] == 0.25).all()
    assert np.abs(np.diff(values)).max() <= 0.25


def test_warmup_cosine_follows_its_formula() -> None:
    values = _values(schedules.warmup_cosine(1.0, 4, 16, end_learning_rate=0.1), 20)
    expected = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(13) / 12)) / 2
    np.testing.assert_allclose(values[:4], [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(values[4:17], expected, rtol=1e-6)
    np.testing.assert_allclose(values[16:], np.float32(0.1), rtol=0)


Decaying = Callable[..., optax.Schedule]
DECAYING = (
    schedules.bert_warmup_polynomial,
    schedules.warmup_polynomial,
    schedules.warmup_cosine,
)


@pytest.mark.parametrize("make", DECAYING)
@pytest.mark.parametrize(("warmup", "total"), [(0, 9), (0, 41), (1, 47), (6, 47), (10, 51)])
def test_the_learning_rate_ends_at_exactly_0(make: Decaying, warmup: int, total: int) -> None:
    """XLA may compile x / N as x * (1 / N), and in float32 9 * (1 / 9) is not 1."""
    assert jax.jit(make(1.0, warmup, total))(total) == 0


@pytest.mark.parametrize("make", DECAYING[:2])
def test_a_power_below_1_does_not_end_in_nan(make: Decaying) -> None:
    assert (_values(make(1.0, 0, 9, power=0.5), 12)[9:] == 0).all()


@pytest.mark.parametrize("make", DECAYING)
def test_a_warmup_over_all_steps_ends_at_0(make: Decaying) -> None:
    np.testing.assert_allclose(_values(make(1.0, 2, 2), 5), [0, 0.5, 0, 0, 0])


@pytest.mark.parametrize("make", DECAYING)
def test_the_learning_rate_is_a_float32_scalar(make: Decaying) -> None:
    for step in (jnp.zeros((), jnp.int32), 3, np.int64(5)):
        rate = make(0.1, 2, 10)(step)
        assert (rate.shape, rate.dtype) == ((), jnp.float32)


def test_constant_is_the_same_at_every_step() -> None:
    assert [float(schedules.constant(0.5)(step)) for step in (0, 1, 10**9)] == [0.5] * 3
    with pytest.raises(ValueError, match="learning_rate"):
        schedules.constant(-1.0)


@pytest.mark.parametrize("make", DECAYING)
def test_bad_arguments_raise(make: Decaying) -> None:
    with pytest.raises(ValueError, match="warmup_steps must be at most total_steps, got 11 of 10"):
        make(0.1, 11, 10)
    with pytest.raises(ValueError, match="total_steps must be >= 1"):
        make(0.1, 0, 0)
    with pytest.raises(TypeError, match="warmup_steps must be a whole number"):
        make(0.1, 0.1, 10)
    with pytest.raises(ValueError, match="learning_rate must be in"):
        make(math.nan, 0, 10)
    with pytest.raises(ValueError, match="end_learning_rate must be in"):
        make(0.1, 0, 10, end_learning_rate=-0.1)


@pytest.mark.parametrize("make", DECAYING[:2])
def test_a_power_of_0_raises(make: Decaying) -> None:
    with pytest.raises(ValueError, match="power must be in"):
        make(0.1, 0, 10, power=0.0)


def test_mixed_batch_runs_the_schedule_of_each_stage_from_its_start() -> None:
    """Quotes the LAMB paper: "mixed-batch training ... a re-warm-up for the second stage"."""
    stages = [
        schedules.Stage(9, schedules.bert_warmup_polynomial(1.0, 3, 9)),
        schedules.Stage(5, schedules.warmup_polynomial(0.5, 2, 5)),
        schedules.Stage(4, schedules.warmup_cosine(0.25, 1, 4)),
    ]
    values = _values(schedules.mixed_batch(stages), 20)
    for start, stage in zip((0, 9, 14), stages, strict=True):
        assert values[start] == 0
        own = _values(stage.schedule, stage.steps)
        np.testing.assert_allclose(values[start : start + stage.steps], own, rtol=RTOL)
        assert own[1:].all()
    assert (values[18:] == 0).all()


def test_mixed_batch_of_one_stage_is_the_schedule_of_the_stage() -> None:
    schedule = schedules.warmup_cosine(1.0, 2, 8)
    mixed = schedules.mixed_batch([schedules.Stage(8, schedule)])
    np.testing.assert_array_equal(_values(mixed, 10), _values(schedule, 10))


def test_bad_stages_raise() -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        schedules.mixed_batch([])
    with pytest.raises(ValueError, match="steps of a stage must be >= 1, got 0"):
        schedules.mixed_batch([schedules.Stage(0, schedules.constant(1.0))])


def test_scaling_rules_for_the_batch_size() -> None:
    assert schedules.scale_linearly(0.1, 8192, 256) == pytest.approx(3.2)
    assert schedules.scale_by_square_root(0.1, 4096, 256) == pytest.approx(0.4)
    assert schedules.scale_linearly(0.1, 256, 256) == 0.1
    with pytest.raises(ValueError, match="base_batch_size must be >= 1, got 0"):
        schedules.scale_linearly(0.1, 256, 0)


TABLE_4 = {  # batch size: learning rate, warmup ratio, as printed in the paper
    512: (5 / (2**3 * 10**3), 1 / 320),
    1024: (5 / (2**2.5 * 10**3), 1 / 160),
    2048: (5 / (2**2 * 10**3), 1 / 80),
    4096: (5 / (2**1.5 * 10**3), 1 / 40),
    8192: (5 / (2**1 * 10**3), 1 / 20),
    16384: (5 / (2**0.5 * 10**3), 1 / 10),
    32768: (5 / 10**3, 1 / 5),
}


def test_the_lamb_recipe_has_the_batch_sizes_of_the_table() -> None:
    assert tuple(TABLE_4) == schedules.LAMB_BATCH_SIZES


@pytest.mark.parametrize("batch_size", TABLE_4)
def test_the_lamb_recipe_gives_the_numbers_of_the_table(batch_size: int) -> None:
    recipe = schedules.lamb_recipe(batch_size)
    assert tuple(recipe) == pytest.approx(TABLE_4[batch_size], rel=1e-12)
    by_root = schedules.scale_by_square_root(5 / (2**3 * 10**3), batch_size, 512)
    assert recipe.learning_rate == pytest.approx(by_root, rel=1e-12)


def test_the_lamb_recipe_gives_the_warmup_in_steps() -> None:
    """At batch size 32,768, 7,813 steps replace 1,000,000 of size 256; a fifth are warmup."""
    assert schedules.lamb_recipe(32768).warmup_steps(7813) == 1563
    with pytest.raises(ValueError, match=r"the recipe is for the batch sizes 512, 1024.*got 256"):
        schedules.lamb_recipe(256)


def test_exponential_has_a_constant_factor_and_both_ends() -> None:
    schedule = schedules.exponential(1e-4, 1.0, total_steps=5)
    rates = [float(schedule(step)) for step in range(7)]
    # float32: the exponent is rounded to about 1e-6.
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1.0, 1.0], rel=1e-5)
