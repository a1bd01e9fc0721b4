"""Random problems for the tests of the optimizers, and functions that train on them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optim_zoo
from optim_zoo import stacked
from tests import quick

Arrays = dict[str, np.ndarray]

# Layers of several ranks. The gradients of "bias" are as small as the eps of some tests, "zero"
# starts at zero, and the first two gradients of "still" are zero.
SHAPES = {
    "kernel": (5, 3),
    "bias": (3,),
    "scale": (),
    "conv": (2, 3, 4),
    "zero": (2,),
    "still": (2,),
}
PARAM_SCALES = {"kernel": 0.1, "bias": 1.0, "scale": 10.0, "conv": 1.0, "zero": 0.0, "still": 1.0}
GRAD_SCALES = {"kernel": 1.0, "bias": 1e-3, "scale": 100.0, "conv": 1.0, "zero": 1.0, "still": 1.0}


def problem(rng: np.random.Generator, steps: int = 10) -> tuple[Arrays, list[Arrays]]:
    """Returns parameters, and the gradients of each step, in float64."""
    params = {k: np.asarray(PARAM_SCALES[k] * rng.normal(size=s)) for k, s in SHAPES.items()}
    grads = [
        {k: np.asarray(GRAD_SCALES[k] * rng.normal(size=s)) for k, s in SHAPES.items()}
        for _ in range(steps)
    ]
    for g in grads[:2]:
        g["still"] = np.zeros(SHAPES["still"])
    return params, grads


def schedule(step: Any) -> Any:
    """Returns a learning rate that decreases in every step."""
    return 0.1 / (step + 1.0)


def train(tx: optax.GradientTransformation, params: Any, grads: Sequence[Any]) -> list[Any]:
    """Returns the parameters after each step."""
    x = jax.tree.map(jnp.asarray, params)
    state = tx.init(x)

    @quick.jit
    def step(x: Any, state: Any, g: Any) -> tuple[Any, Any]:
        updates, state = tx.update(g, state, x)
        return optim_zoo.apply_updates(x, updates), state

    trajectory = []
    for g in grads:
        x, state = step(x, state, jax.tree.map(jnp.asarray, g))
        trajectory.append(jax.tree.map(np.asarray, x))
    return trajectory


def train_in_float64(
    make: Callable[[], optax.GradientTransformation], params: Any, grads: Sequence[Any]
) -> list[Any]:
    """Calls `train` in float64 with the optimizer that ``make`` returns."""
    with jax.enable_x64(True):
        return train(make(), params, grads)


def assert_same_path(
    actual: Sequence[Arrays], expected: Sequence[Arrays], rtol: float = 1e-11, atol: float = 1e-12
) -> None:
    """Compares two trajectories of about ten steps in float64, step by step.

    Of sixteen digits, 1 - 0.999 loses three, and parameters that pass near zero lose up to three
    more.
    """
    for step, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.keys() == y.keys()
        for name in y:
            assert x[name].dtype == np.float64
            np.testing.assert_allclose(x[name], y[name], rtol, atol, err_msg=f"{name}, {step}")


def assert_stacked_layers_train_as_separate_arrays(
    make: Callable[..., optax.GradientTransformation], rng: np.random.Generator
) -> None:
    """Trains four layers as one array and as four arrays, in float32, with scales of 0.03 to 30.

    Args:
      make: A constructor that takes ``layers``. Its steps should be about a tenth of the norm of
        a layer.
    """
    scales = np.float32([0.03, 0.3, 3.0, 30.0])
    start = scales[:, None, None] * np.float32(rng.normal(size=(4, 5, 3)))
    grads = [np.float32(rng.normal(size=start.shape)) / scales[:, None, None] for _ in range(8)]
    together = train(
        make(layers=[("stack", stacked(0))]), {"stack": start}, [{"stack": g} for g in grads]
    )
    separate = train(make(), dict(enumerate(start)), [dict(enumerate(g)) for g in grads])
    for x, y in zip(together, separate, strict=True):
        for i in range(4):
            moved = np.linalg.norm(y[i] - start[i])
            assert moved > 0.02 * np.linalg.norm(start[i])
            # Norms are summed in another order, which changes each step by one rounding, 1e-7.
            assert np.linalg.norm(x["stack"][i] - y[i]) <= 1e-6 * moved
