import numpy as np
import pytest

from optim_zoo import adadelta
from tests.optimizers.problems import assert_same_path, problem, schedule, train_in_float64
from tests.reference import adadelta as reference


@pytest.mark.parametrize("arguments", [{}, {"rho": 0.6, "eps": 1e-3}])
def test_steps_follow_the_reference(rng: np.random.Generator, arguments: dict) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: adadelta(schedule, **arguments), params, grads)
    assert_same_path(
        trajectory, reference.adadelta(params, grads, learning_rate=schedule, **arguments)
    )


def test_the_default_learning_rate_is_1_as_in_the_paper(rng: np.random.Generator) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(adadelta, params, grads)
    assert_same_path(trajectory, reference.adadelta(params, grads, learning_rate=lambda _: 1.0))


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_rescaling_the_gradients_does_not_rescale_the_steps(
    rng: np.random.Generator, factor: float
) -> None:
    """Checks section 3.2 of the paper: rescaling the gradients does not rescale the steps.

    This holds if eps is far below the squared gradients. If eps is scaled with the squared
    gradients instead, the steps scale with the gradients.
    """
    params, grads = problem(rng)
    params = {k: np.zeros_like(x) for k, x in params.items() if k not in ("bias", "still")}
    grads = [{k: g[k] for k in params} for g in grads]
    assert min(np.abs(g[k]).min() for g in grads for k in g) > 1e-4
    scaled = [{k: factor * g[k] for k in g} for g in grads]
    trajectory = train_in_float64(lambda: adadelta(eps=1e-25), params, grads)
    # Squared gradients are above 1e-14 even if scaled down, and eps is 1e-11 times that.
    in_other_units = train_in_float64(lambda: adadelta(eps=1e-25), params, scaled)
    assert_same_path(in_other_units, trajectory, rtol=1e-9, atol=0.0)

    trajectory = train_in_float64(lambda: adadelta(eps=1e-3), params, grads)
    alike = train_in_float64(lambda: adadelta(eps=1e-3 * factor**2), params, scaled)
    assert_same_path(alike, [{k: factor * v for k, v in x.items()} for x in trajectory], atol=0.0)


def test_the_learning_rate_does_not_enter_the_average_of_the_steps(
    rng: np.random.Generator,
) -> None:
    params, grads = problem(rng)
    params = {k: np.zeros_like(x) for k, x in params.items()}
    once = train_in_float64(lambda: adadelta(0.1), params, grads)
    twice = train_in_float64(lambda: adadelta(0.2), params, grads)
    assert_same_path(twice, [{k: 2 * v for k, v in x.items()} for x in once])
