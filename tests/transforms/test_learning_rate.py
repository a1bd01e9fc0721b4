import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import scale_by_learning_rate

U = {"x": jnp.asarray([1.0, -2.0])}


def test_a_schedule_starts_at_step_0_and_the_state_holds_the_current_value() -> None:
    tx = scale_by_learning_rate(lambda step: 0.5 * step)
    state = tx.init(U)
    for step in range(4):
        updates, state = jax.jit(tx.update)(U, state)
        assert state.rate == 0.5 * step
        assert state.step == step + 1
        np.testing.assert_array_equal(updates["x"], -0.5 * step * U["x"])


def test_a_run_can_change_from_a_number_to_a_schedule() -> None:
    _, state = scale_by_learning_rate(0.25).update(U, scale_by_learning_rate(0.25).init(U))
    later = scale_by_learning_rate(lambda step: jnp.where(step == 1, 2.0, 0.0))
    updates, changed = later.update(U, state)
    np.testing.assert_array_equal(updates["x"], -2.0 * U["x"])
    assert jax.tree.structure(changed) == jax.tree.structure(state)


@pytest.mark.parametrize(
    "rate", [1, 0.5, np.float64(0.5), jnp.asarray(0.5, "bfloat16"), lambda step: step, lambda _: 1]
)
def test_the_learning_rate_in_the_state_is_float32(rate: optax.ScalarOrSchedule) -> None:
    tx = scale_by_learning_rate(rate)
    state = tx.init(U)
    for _ in range(2):
        assert (state.rate.dtype, state.rate.weak_type) == (jnp.float32, False)
        _, state = tx.update(U, state)


def test_the_state_copies_an_array_of_the_caller() -> None:
    rate = jnp.asarray(0.5)
    state = scale_by_learning_rate(rate).init(U)
    assert state.rate.unsafe_buffer_pointer() != rate.unsafe_buffer_pointer()


def test_an_update_has_the_dtype_of_its_parameter() -> None:
    tx = scale_by_learning_rate(0.1)
    params = {"x": jnp.ones(2, "bfloat16")}
    updates, _ = tx.update(U, tx.init(params), params)
    assert updates["x"].dtype == jnp.bfloat16
    updates, _ = tx.update(U, tx.init(params))
    assert updates["x"].dtype == jnp.float32


@pytest.mark.parametrize("rate", [-0.1, np.nan, np.inf])
def test_a_learning_rate_out_of_range_raises(rate: float) -> None:
    with pytest.raises(ValueError, match="learning_rate must be in"):
        scale_by_learning_rate(rate)
