import numpy as np
import pytest

from optim_zoo import adam, amsgrad
from tests.optimizers.problems import assert_same_path, problem, schedule, train_in_float64
from tests.reference import amsgrad as reference


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"b1": 0.7, "b2": 0.5, "eps": 1e-3},
        {"b1": 0.7, "b2": 0.5, "eps": 1e-3, "bias_correction": False},
    ],
)
def test_steps_follow_the_reference(rng: np.random.Generator, arguments: dict) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: amsgrad(schedule, **arguments), params, grads)
    assert_same_path(
        trajectory, reference.amsgrad(params, grads, learning_rate=schedule, **arguments)
    )


@pytest.mark.parametrize("bias_correction", [True, False])
def test_amsgrad_equals_adam_while_the_second_moment_grows(
    rng: np.random.Generator, bias_correction: bool
) -> None:
    params, grads = problem(rng)
    growing = [{k: 2.0**t * np.sign(g[k]) for k in g} for t, g in enumerate(grads)]
    del params["still"]
    growing = [{k: g[k] for k in params} for g in growing]
    assert_same_path(
        *(
            train_in_float64(
                lambda f=f: f(schedule, b2=0.8, bias_correction=bias_correction), params, growing
            )
            for f in (amsgrad, adam)
        )
    )


def test_steps_stay_small_after_a_large_gradient() -> None:
    """Tests the "long-term memory" of the paper: the maximum stays 0.1 * 1000^2."""
    sizes = [1.0, 1000.0, *[1.0] * 200]
    gradients = [{"x": np.asarray([g])} for g in sizes]
    last = {}
    for f in (amsgrad, adam):
        trajectory = train_in_float64(lambda f=f: f(1.0, b2=0.9), {"x": np.zeros(1)}, gradients)
        last[f] = float(trajectory[-2]["x"][0] - trajectory[-1]["x"][0])
    # The average of Adam has decayed by 0.9^200 = 7e-10, from 0.1 * 1000^2 to 1e-4.
    assert last[adam] == pytest.approx(1.0, rel=1e-2)
    assert last[amsgrad] == pytest.approx(1 / np.sqrt(0.1 * 1000**2), rel=1e-2)
