import numpy as np
import pytest

from optim_zoo import adadelta
from tests.optimizers.problems import assert_same_path, problem, schedule, train_in_float64
from tests.reference import adadelta as reference


@pytest.mark.parametrize("arguments", [{}, {"rho": 0.6, "eps": 1e-3}])
def test_the_algorithm(rng: np.random.Generator, arguments: dict) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: adadelta(schedule, **arguments), params, grads)
    assert_same_path(
        trajectory, reference.adadelta(params, grads, learning_rate=schedule, **arguments)
    )


def test_the_default_learning_rate_is_that_of_the_paper(rng: np.random.Generator) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(adadelta, params, grads)
    assert_same_path(trajectory, reference.adadelta(params, grads, learning_rate=lambda _: 1.0))


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_steps_have_the_units_of_the_parameters(
    rng: np.random.Generator, factor: float
) -> None:
    """By section 3.2 of the paper, they do not have the units of the gradient.

    Where eps is far below the squared gradients, their unit drops out. Where eps is measured in
    it, the averages of g^2 and of u^2 scale alike, and so does u.
    """
    params, grads = problem(rng)
    params = {k: np.zeros_like(x) for k, x in params.items() if k not in ("bias", "still")}
    grads = [{k: g[k] for k in params} for g in grads]
    assert min(np.abs(g[k]).min() for g in grads for k in g) > 1e-4
    scaled = [{k: factor * g[k] for k in g} for g in grads]
    trajectory = train_in_float64(lambda: adadelta(eps=1e-25), params, grads)
    # Squared gradients are above 1e-14 also when they are scaled, and eps is 1e-11 of that.
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
