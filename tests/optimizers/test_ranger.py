import numpy as np
import optax
import pytest

from optim_zoo import lookahead, radam, ranger
from tests.optimizers.problems import assert_same_path, problem, schedule, train_in_float64
from tests.reference import ranger as reference


@pytest.mark.parametrize(
    ("ours", "papers"),
    [
        ({}, {}),
        (
            {"weight_decay": 0.3, "exclude_from_weight_decay": ["bias", "^conv$"]},
            {"weight_decay": 0.3, "undecayed": ("bias", "conv")},
        ),
        *(
            (arguments, arguments)
            for arguments in (
                {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.3, "threshold": 6.5},
                {"sync_period": 3, "slow_step_size": 0.8, "weight_decay": 0.3},
                {"gradient_centralization": True},
            )
        ),
    ],
)
def test_steps_follow_the_reference(rng: np.random.Generator, ours: dict, papers: dict) -> None:
    params, grads = problem(rng, steps=13)
    trajectory = train_in_float64(lambda: ranger(schedule, **ours), params, grads)
    assert_same_path(trajectory, reference.ranger(params, grads, learning_rate=schedule, **papers))


def test_ranger_without_decay_equals_lookahead_around_radam(rng: np.random.Generator) -> None:
    params, grads = problem(rng, steps=13)
    assert_same_path(
        train_in_float64(lambda: ranger(schedule), params, grads),
        train_in_float64(
            lambda: lookahead(radam(schedule, 0.95, 0.999, 1e-5), 6, 0.5), params, grads
        ),
    )


def test_centralization_removes_a_shift_of_each_output_feature(
    rng: np.random.Generator,
) -> None:
    """Adding a number per output feature to the gradients of matrices changes nothing."""
    params, grads = problem(rng)
    shifts = {
        k: rng.normal(size=np.shape(x)[-1:]) if np.ndim(x) > 1 else 0.0 for k, x in params.items()
    }
    shifted = [{k: g[k] + shifts[k] for k in g} for g in grads]

    def centralized() -> optax.GradientTransformation:
        return ranger(schedule, gradient_centralization=True)

    trajectory = train_in_float64(centralized, params, grads)
    assert_same_path(train_in_float64(centralized, params, shifted), trajectory)
    plain = train_in_float64(lambda: ranger(schedule), params, grads)
    for name in ("bias", "scale"):
        np.testing.assert_allclose(trajectory[-1][name], plain[-1][name], rtol=1e-11)
    # Steps that are not rectified keep the sum of the weights of each output feature.
    for name in ("kernel", "conv"):
        axes = tuple(range(params[name].ndim - 1))
        np.testing.assert_allclose(
            np.sum(trajectory[4][name], axes), np.sum(params[name], axes), rtol=1e-11
        )


def test_the_decay_is_decoupled() -> None:
    """Without a gradient, each step multiplies the parameters by 1 - learning_rate weight_decay."""
    params = {"x": np.asarray([1.0, -20.0])}
    trajectory = train_in_float64(
        lambda: ranger(0.1, weight_decay=0.5, sync_period=100), params, [{"x": np.zeros(2)}] * 8
    )
    for t, x in enumerate(trajectory, 1):
        np.testing.assert_allclose(x["x"], 0.95**t * params["x"], rtol=1e-12)
