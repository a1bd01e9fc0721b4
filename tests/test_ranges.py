import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim_zoo import ranges


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), jnp.asarray(0.5), np.asarray(0.0)])
def test_numbers_in_range_are_accepted(value: Any) -> None:
    ranges.check("b1", value, 0.0, 1.0, open_high=True)


@pytest.mark.parametrize("value", [-1e-9, 1.0, 1.2, math.nan, np.float32(1), jnp.asarray([0, 2.0])])
def test_numbers_out_of_range_raise(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^b1 must be in \[0, 1\), got "):
        ranges.check("b1", value, 0.0, 1.0, open_high=True)


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], 1j])
def test_values_that_are_not_numbers_raise(value: Any) -> None:
    with pytest.raises(TypeError, match="b1 must be a number"):
        ranges.check("b1", value, 0.0, 1.0)


def test_the_ends_of_a_range_may_be_open_or_closed() -> None:
    ranges.check("x", 1.0, 0.0, 1.0)
    ranges.check("x", math.inf, 0.0)
    with pytest.raises(ValueError, match=r"x must be in \(0, inf\]"):
        ranges.check("x", 0.0, 0.0, open_low=True)
    with pytest.raises(ValueError, match=r"x must be in \[0, inf\)"):
        ranges.check("x", math.inf, 0.0, open_high=True)


def test_traced_numbers_are_accepted() -> None:
    def checked(x: jax.Array) -> jax.Array:
        ranges.check("x", x, 0.0, 1.0)
        ranges.check_count("x", x)
        ranges.check_learning_rate(x)
        ranges.check_bounds("x", (x, 0.0))
        return x

    assert jax.jit(checked)(2.0) == 2
    np.testing.assert_array_equal(jax.vmap(checked)(jnp.ones(2)), jnp.ones(2))


def test_check_count_requires_a_whole_number() -> None:
    ranges.check_count("steps", np.int64(3), 1)
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        ranges.check_count("steps", 0, 1)
    for value in (1.0, True, "1"):
        with pytest.raises(TypeError, match="steps must be a whole number"):
            ranges.check_count("steps", value)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_check_learning_rate_refuses_numbers_out_of_range(value: float) -> None:
    ranges.check_learning_rate(lambda step: value)
    with pytest.raises(ValueError, match="learning_rate must be in"):
        ranges.check_learning_rate(value)


def test_check_bounds_requires_an_ordered_pair() -> None:
    for bounds in (None, (0, 1), (None, None), [None, 10.0], (1.0, 1.0), (0.0, math.inf)):
        ranges.check_bounds("phi_bounds", bounds)
    with pytest.raises(ValueError, match="phi_bounds must have low <= high"):
        ranges.check_bounds("phi_bounds", (2.0, 1.0))
    with pytest.raises(ValueError, match="phi_bounds must be in"):
        ranges.check_bounds("phi_bounds", (-1.0, None))
    for bounds in (1.0, (1.0,), "ab", (0, 1, 2)):
        with pytest.raises(TypeError, match="phi_bounds must be a pair"):
            ranges.check_bounds("phi_bounds", bounds)  # type: ignore[arg-type]


def test_check_choice_suggests_the_nearest_name() -> None:
    ranges.check_choice("optimizer", "lamb", ["lamb", "lars"])
    with pytest.raises(ValueError, match=r"unknown optimizer 'lamp'; did you mean lamb\?"):
        ranges.check_choice("optimizer", "lamp", ["lamb", "sgd"])
    with pytest.raises(ValueError, match="unknown optimizer None; expected lamb, sgd"):
        ranges.check_choice("optimizer", None, ["lamb", "sgd"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_decay_rate_must_be_float32_or_wider_even_if_traced(dtype: Any) -> None:
    with pytest.raises(TypeError, match="b2 must be float32 or wider"):
        jax.jit(lambda b2: ranges.check_decay("b2", b2))(jnp.asarray(0.5, dtype))
    ranges.check_decay("b2", jnp.float32(0.999))
    with pytest.raises(ValueError, match=r"b2 must be in \[0, 1\), got 1.0"):
        ranges.check_decay("b2", 1.0)
