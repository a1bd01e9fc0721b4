import numpy as np
import pytest

from optim_zoo import lars_ema
from tests.optimizers.problems import (
    assert_same_path,
    assert_stacked_layers_train_as_separate_arrays,
    problem,
    schedule,
    train_in_float64,
)
from tests.reference import lars_ema as reference


@pytest.mark.parametrize(
    ("ours", "papers"),
    [
        ({}, {}),
        ({"b1": 0.7, "weight_decay": 0.3}, {"b1": 0.7, "weight_decay": 0.3}),
        ({"phi_bounds": (0.5, 2.0)}, {"phi": lambda z: min(max(z, 0.5), 2.0)}),
        (
            {"weight_decay": 0.3, "exclude_from_weight_decay": ["bias", "^conv$"]},
            {"weight_decay": 0.3, "undecayed": ("bias", "conv")},
        ),
        (
            {"weight_decay": 0.3, "exclude_from_layer_adaptation": ["bias", "^conv$"]},
            {"weight_decay": 0.3, "unadapted": ("bias", "conv")},
        ),
    ],
)
def test_steps_follow_the_reference(rng: np.random.Generator, ours: dict, papers: dict) -> None:
    """Tests x_{t+1} = x_t - eta_t phi(|x_t|) / |m_t| m_t."""
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: lars_ema(schedule, **ours), params, grads)
    assert_same_path(
        trajectory, reference.lars_ema(params, grads, learning_rate=schedule, **papers)
    )


@pytest.mark.parametrize("bounds", [None, (0.5, 2.0)])
def test_every_step_of_a_layer_is_the_learning_rate_times_phi_of_its_norm(
    rng: np.random.Generator, bounds: tuple[float, float] | None
) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(
        lambda: lars_ema(schedule, weight_decay=0.3, phi_bounds=bounds), params, grads
    )
    for step, (x, y) in enumerate(zip([params, *trajectory[:-1]], trajectory, strict=True)):
        for name in ("kernel", "bias", "scale", "conv"):
            size = np.linalg.norm(x[name])
            phi = size if bounds is None else np.clip(size, *bounds)
            moved = np.linalg.norm(y[name] - x[name])
            np.testing.assert_allclose(moved, schedule(step) * phi, rtol=1e-11)


def test_ratio_bounds_of_1_turn_layer_adaptation_off(rng: np.random.Generator) -> None:
    """With a trust ratio of 1, the direction is the averaged gradient."""
    params, grads = problem(rng)
    trajectory = train_in_float64(
        lambda: lars_ema(schedule, ratio_bounds=(1.0, 1.0)), params, grads
    )
    expected = reference.lars_ema(params, grads, learning_rate=schedule, unadapted=tuple(params))
    assert_same_path(trajectory, expected)


def test_layers_in_one_array_train_like_separate_arrays(rng: np.random.Generator) -> None:
    assert_stacked_layers_train_as_separate_arrays(
        lambda **layers: lars_ema(0.1, weight_decay=0.01, **layers), rng
    )
