from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import adamw, lamb, metrics, schedules, split, stacked
from tests import quick
from tests.optimizers import problems
from tests.reference import lamb as reference

Arrays = dict[str, np.ndarray]
SHAPES = {"dense/kernel": (5, 3), "dense/bias": (3,), "norm/scale": (3,), "zero": (2, 2)}


def _problem(rng: np.random.Generator, steps: int = 12) -> tuple[Arrays, list[Arrays]]:
    """Returns layers whose scales differ by a factor of 1000, and one layer of zeros."""
    scales = dict(zip(SHAPES, (1e-2, 10.0, 1.0, 0.0), strict=True))
    params = {k: np.float32(scales[k] * rng.normal(size=s)) for k, s in SHAPES.items()}
    grads = [{k: np.float32(rng.normal(size=s)) for k, s in SHAPES.items()} for _ in range(steps)]
    return params, grads


def _train(
    tx: optax.GradientTransformation, params: Arrays, grads: list[Arrays]
) -> tuple[list[Arrays], optax.OptState]:
    x = jax.tree.map(jnp.asarray, params)
    state = tx.init(x)

    @quick.jit
    def step(x: Any, state: optax.OptState, g: Any) -> tuple[Any, optax.OptState]:
        updates, state = tx.update(g, state, x)
        return optax.apply_updates(x, updates), state

    trajectory = []
    for g in grads:
        x, state = step(x, state, g)
        trajectory.append(x)
    return trajectory, state


@pytest.mark.parametrize(
    ("ours", "papers"),
    [
        ({}, {}),
        ({"weight_decay": 0.01}, {"weight_decay": 0.01}),
        ({"bias_correction": False}, {"bias_correction": False}),
        ({"b1": 0.0, "b2": 0.5, "eps": 1e-3}, {"b1": 0.0, "b2": 0.5, "eps": 1e-3}),
        ({"phi_bounds": (None, 0.5)}, {"phi": lambda z: min(z, 0.5)}),
        (
            {"weight_decay": 0.1, "exclude_from_weight_decay": ["bias", "norm"]},
            {"weight_decay": 0.1, "undecayed": ("dense/bias", "norm/scale")},
        ),
        (
            {"weight_decay": 0.1, "exclude_from_layer_adaptation": ["bias", "norm"]},
            {"weight_decay": 0.1, "unadapted": ("dense/bias", "norm/scale")},
        ),
    ],
)
def test_steps_follow_the_reference(rng: np.random.Generator, ours: dict, papers: dict) -> None:
    """Tests x_{t+1} = x_t - eta_t phi(|x_t|) / |r_t + lambda x_t| (r_t + lambda x_t)."""
    params, grads = _problem(rng)
    schedule = schedules.warmup_polynomial(0.1, 3, 10)
    trajectory, _ = _train(lamb(schedule, **ours), params, grads)
    rates = [0.1 * s / 3 if s < 3 else 0.1 * (10 - min(s, 10)) / 7 for s in range(12)]
    expected = reference.lamb(params, grads, learning_rate=rates.__getitem__, **papers)
    for step, (x, y) in enumerate(zip(trajectory, expected, strict=True)):
        for name in SHAPES:
            # Twelve float32 steps, each with an error of a few times 1e-7 of the largest entry.
            atol = 2e-6 * max(np.abs(y[name]).max(), 1e-3)
            np.testing.assert_allclose(x[name], y[name], 2e-6, atol, err_msg=f"{name}, {step}")


def test_the_step_of_a_layer_is_its_norm_times_the_learning_rate(rng: np.random.Generator) -> None:
    """The step of a layer does not depend on the scale of its gradient."""
    params, grads = _problem(rng, steps=1)
    factors = {"dense/kernel": 1e-3, "dense/bias": 1e3, "norm/scale": 1.0, "zero": 1.0}
    scaled = [{k: np.float32(factors[k]) * g for k, g in grads[0].items()}]
    for gradients in (grads, scaled):
        ((x,), _) = _train(lamb(0.1, eps=0.0), params, gradients)
        for name in ("dense/kernel", "dense/bias", "norm/scale"):
            moved = np.linalg.norm(x[name] - params[name])
            np.testing.assert_allclose(moved, 0.1 * np.linalg.norm(params[name]), rtol=1e-5)


@pytest.mark.parametrize("spec", [stacked(0), split(0, 3), stacked(1), split(2, 2),
                                  (stacked(0), split(-1, 2)), (split(1, 2), stacked(0)),
                                  (stacked(0), stacked(1), split(2, 3))])  # fmt: skip
def test_layers_in_one_array_train_like_separate_arrays(
    rng: np.random.Generator, spec: object
) -> None:
    shape = (3, 4, 6)
    scale = 10.0 ** np.arange(-1, 3, 3 / 71)[:72].reshape(shape)  # a factor of 1000 from end to end
    big = {"x": np.float32(scale * rng.normal(size=shape))}
    grads = [{"x": np.float32(rng.normal(size=shape))} for _ in range(8)]
    specs = spec if isinstance(spec, tuple) else (spec,)

    def separate(x: np.ndarray) -> Arrays:
        pieces = {"": x}
        for item in specs:
            parts = item.parts or x.shape[item.axis]
            pieces = {
                f"{name}/{i}": part
                for name, piece in pieces.items()
                for i, part in enumerate(np.split(piece, parts, item.axis))
            }
        return pieces

    together, state = _train(lamb(0.05, weight_decay=0.1, layers=[("x", spec)]), big, grads)
    start = separate(big["x"])
    separately, separate_state = _train(
        lamb(0.05, weight_decay=0.1), start, [separate(g["x"]) for g in grads]
    )
    for x, y in zip(together, separately, strict=True):
        for name, piece in separate(np.asarray(x["x"])).items():
            moved = np.linalg.norm(y[name] - start[name])
            assert np.linalg.norm(piece - y[name]) <= 1e-6 * max(moved, np.linalg.norm(y[name]))
    ratios = metrics.read(state)["trust_ratio/x"]
    expected = [metrics.read(separate_state)[f"trust_ratio/{name}"] for name in start]
    np.testing.assert_allclose(np.sort(ratios), np.sort(expected), rtol=1e-5)


def test_metrics_list_layers_in_row_major_order(rng: np.random.Generator) -> None:
    x = np.float32(rng.normal(size=(2, 6)))
    for spec in ((stacked(0), split(1, 3)), (split(1, 3), stacked(0))):
        tx = lamb(0.1, layers=[("x", spec)])
        _, state = _train(tx, {"x": x}, [{"x": x}])
        norms = np.linalg.norm(x.reshape(2, 3, 2), axis=-1).reshape(-1)
        np.testing.assert_allclose(metrics.read(state)["parameter_norm/x"], norms, rtol=1e-6)


def test_lamb_with_a_trust_ratio_of_1_equals_adamw(rng: np.random.Generator) -> None:
    params, grads = problems.problem(rng)
    arguments = {"b1": 0.7, "b2": 0.8, "eps": 1e-3, "weight_decay": 0.3}
    schedule = problems.schedule
    problems.assert_same_path(
        problems.train_in_float64(
            lambda: lamb(schedule, ratio_bounds=(1.0, 1.0), **arguments), params, grads
        ),
        problems.train_in_float64(lambda: adamw(schedule, **arguments), params, grads),
    )


@pytest.mark.parametrize(
    ("ours", "papers"),
    [
        ({}, {}),
        (
            {"b1": 0.7, "b2": 0.8, "eps": 1e-3, "weight_decay": 0.3, "phi_bounds": (0.5, 2.0)},
            {"b1": 0.7, "b2": 0.8, "eps": 1e-3, "weight_decay": 0.3,
             "phi": lambda z: min(max(z, 0.5), 2.0)},
        ),
    ],
)  # fmt: skip
def test_float64_steps_follow_the_reference(
    rng: np.random.Generator, ours: dict, papers: dict
) -> None:
    params, grads = problems.problem(rng)
    schedule = problems.schedule
    problems.assert_same_path(
        problems.train_in_float64(lambda: lamb(schedule, **ours), params, grads),
        reference.lamb(params, grads, learning_rate=schedule, **papers),
    )
