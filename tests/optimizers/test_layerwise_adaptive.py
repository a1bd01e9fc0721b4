from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import adam, lamb, lars_ema, layerwise_adaptive, scale_by_adam, trace_momentum
from tests.optimizers.problems import (
    Arrays,
    assert_same_path,
    assert_stacked_layers_train_as_separate_arrays,
    problem,
    schedule,
    train_in_float64,
)
from tests.reference import layerwise_adaptive as reference


def _heavy_ball() -> Callable[[str, np.ndarray, int], np.ndarray]:
    b: Arrays = {}

    def direction(name: str, g: np.ndarray, t: int) -> np.ndarray:
        b[name] = 0.8 * b.get(name, 0.0) + g
        return b[name]

    return direction


@pytest.mark.parametrize(
    ("ours", "papers"),
    [
        ({}, {}),
        ({"phi_bounds": (0.5, 2.0)}, {"phi": lambda z: min(max(z, 0.5), 2.0)}),
        ({"exclude_from_layer_adaptation": ["bias", "^conv$"]}, {"unadapted": ("bias", "conv")}),
    ],
)
@pytest.mark.parametrize("base", ["sgd", "heavy ball"])
def test_steps_follow_the_reference(
    rng: np.random.Generator, base: str, ours: dict, papers: dict
) -> None:
    """Tests x_{t+1} = x_t - eta_t phi(|x_t|) / |u_t| u_t."""
    params, grads = problem(rng)
    tx, direction = {
        "sgd": (optax.identity(), lambda name, g, t: g),
        "heavy ball": (trace_momentum(0.8), _heavy_ball()),
    }[base]
    trajectory = train_in_float64(lambda: layerwise_adaptive(tx, schedule, **ours), params, grads)
    expected = reference.layerwise_adaptive(
        params, grads, base=direction, learning_rate=schedule, **papers
    )
    assert_same_path(trajectory, expected)


def test_with_adam_it_equals_lamb_without_decay(rng: np.random.Generator) -> None:
    params, grads = problem(rng)
    assert_same_path(
        train_in_float64(
            lambda: layerwise_adaptive(
                scale_by_adam(0.7, 0.8, 1e-3), schedule, ratio_bounds=(0.1, 1.0)
            ),
            params,
            grads,
        ),
        train_in_float64(
            lambda: lamb(schedule, 0.7, 0.8, 1e-3, ratio_bounds=(0.1, 1.0)), params, grads
        ),
    )


def test_with_a_moving_average_it_equals_lars_ema_without_decay(rng: np.random.Generator) -> None:
    params, grads = problem(rng)
    assert_same_path(
        train_in_float64(
            lambda: layerwise_adaptive(trace_momentum(0.9, ema=True), schedule), params, grads
        ),
        train_in_float64(lambda: lars_ema(schedule, 0.9), params, grads),
    )


def test_layers_in_one_array_train_like_separate_arrays(rng: np.random.Generator) -> None:
    assert_stacked_layers_train_as_separate_arrays(
        lambda **layers: layerwise_adaptive(scale_by_adam(), 0.1, **layers), rng
    )


def test_an_optimizer_as_base_raises() -> None:
    """The updates of an optimizer point downhill; negated once more, they would go uphill."""
    with pytest.raises(ValueError, match="base must be a direction"):
        layerwise_adaptive(adam(0.1), 0.1).init({"x": jnp.ones(2)})
    with pytest.raises(TypeError, match="base must be"):
        layerwise_adaptive(0.1, 0.1)  # type: ignore[arg-type]
