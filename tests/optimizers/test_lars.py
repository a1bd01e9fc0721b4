from collections.abc import Callable
from typing import Any

import numpy as np
import optax
import pytest

from optim_zoo import lars, momentum
from tests.optimizers.problems import (
    assert_same_path,
    assert_stacked_layers_train_as_separate_arrays,
    problem,
    schedule,
    train_in_float64,
)
from tests.reference import lars as reference


def _rate(step: Any) -> Any:
    """Returns a learning rate that moves layers by up to 10% with trust coefficient 0.001."""
    return 1000 * schedule(step)


@pytest.mark.parametrize(
    ("ours", "papers"),
    [
        *(
            (arguments, arguments)
            for arguments in (
                {},
                {"momentum": 0.7, "weight_decay": 0.3, "trust_coefficient": 0.002, "eps": 0.1},
                {"weight_decay": 0.3, "nesterov": True},
                {"weight_decay": 0.3, "lr_inside_momentum": False},
                {"weight_decay": 0.3, "nesterov": True, "lr_inside_momentum": False},
                {"momentum": 0.0, "weight_decay": 0.3},
            )
        ),
        (
            {"weight_decay": 0.3, "exclude_from_weight_decay": ["bias", "^conv$"]},
            {"weight_decay": 0.3, "undecayed": ("bias", "conv")},
        ),
    ],
)
def test_steps_follow_the_reference(rng: np.random.Generator, ours: dict, papers: dict) -> None:
    """One layer starts at zero, where the ratio is 1, and one has zero gradients at first."""
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: lars(_rate, **ours), params, grads)
    assert_same_path(trajectory, reference.lars(params, grads, learning_rate=_rate, **papers))


def test_excluded_layers_make_steps_of_momentum(rng: np.random.Generator) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(
        lambda: lars(
            schedule, weight_decay=0.3, trust_coefficient=1.0, lr_inside_momentum=False,
            exclude_from_weight_decay=["bias"], exclude_from_layer_adaptation=["bias", "^conv$"],
        ), params, grads,
    )  # fmt: skip
    expected = reference.lars(
        params, grads, learning_rate=schedule, weight_decay=0.3, trust_coefficient=1.0,
        lr_inside_momentum=False, undecayed=("bias",), unadapted=("bias", "conv"),
    )  # fmt: skip
    assert_same_path(trajectory, expected)
    plain = train_in_float64(lambda: momentum(schedule), params, grads)
    for x, y in zip(trajectory, plain, strict=True):
        np.testing.assert_allclose(x["bias"], y["bias"], rtol=1e-11)


def test_steps_do_not_depend_on_the_scale_of_the_gradient(rng: np.random.Generator) -> None:
    """Without weight decay, the gradient of each layer may have any scale."""
    params, grads = problem(rng)
    del params["zero"]  # its first ratio is 1, whatever the gradient
    grads = [{k: g[k] for k in params} for g in grads]
    factors = dict(zip(params, 10.0 ** np.arange(-3, 7), strict=False))
    scaled = [{k: factors[k] * g[k] for k in g} for g in grads]
    assert_same_path(
        train_in_float64(lambda: lars(_rate, weight_decay=0.0), params, scaled),
        train_in_float64(lambda: lars(_rate, weight_decay=0.0), params, grads),
    )


def test_lr_inside_momentum_matters_only_if_the_learning_rate_changes(
    rng: np.random.Generator,
) -> None:
    params, grads = problem(rng)

    def both(learning_rate: float | Callable[[Any], Any]) -> list[list[Any]]:
        def make(inside: bool) -> optax.GradientTransformation:
            return lars(learning_rate, weight_decay=0.3, lr_inside_momentum=inside)

        return [
            train_in_float64(lambda inside=inside: make(inside), params, grads)
            for inside in (True, False)
        ]

    assert_same_path(*both(30.0))
    inside, outside = both(_rate)
    assert np.abs(inside[-1]["kernel"] - outside[-1]["kernel"]).max() > 1e-3


def test_the_first_step_of_a_layer_is_proportional_to_its_norm(rng: np.random.Generator) -> None:
    params, grads = problem(rng, steps=1)
    (x,) = train_in_float64(lambda: lars(50.0, weight_decay=0.0), params, grads)
    for name in ("kernel", "bias", "scale", "conv"):
        moved = np.linalg.norm(x[name] - params[name])
        np.testing.assert_allclose(moved, 50.0 * 0.001 * np.linalg.norm(params[name]), rtol=1e-12)


@pytest.mark.parametrize("lr_inside_momentum", [True, False])
def test_layers_in_one_array_train_like_separate_arrays(
    rng: np.random.Generator, lr_inside_momentum: bool
) -> None:
    assert_stacked_layers_train_as_separate_arrays(
        lambda **layers: lars(50.0, 0.9, 0.01, lr_inside_momentum=lr_inside_momentum, **layers),
        rng,
    )
