"""Training many runs by one program: what it must agree with."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from optim_zoo.lab.experiments import byte_problem, training
from optim_zoo.lab.experiments.optimizers import OPTIMIZERS
from optim_zoo.train.random_numbers import KEYS
from optim_zoo.train.tasks.byte_language.sections import Model
from optim_zoo.tree import Tree

EXAMPLES, MICRO, BATCH, RATE, SEED = 24, 4, 8, 0.05, 1
(LAMB,) = (optimizer for optimizer in OPTIMIZERS if optimizer.name == "lamb")


@pytest.fixture(scope="module")
def problem() -> training.Problem:
    return byte_problem.problem(Model(1, 4, 1, 4), 4, EXAMPLES, MICRO)


def make(schedule: optax.Schedule) -> optax.GradientTransformation:
    return LAMB.make(schedule, byte_problem.EXCLUDED)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_every_batch_size_sees_the_same_examples(
    problem: training.Problem, batch_size: int
) -> None:
    _, data = problem.start(SEED)
    task = problem.task
    before, task.setup = task.setup, dataclasses.replace(task.setup, seed=SEED)
    batches = [
        task.batch(number, byte_problem.stage(batch_size))["ids"]
        for number in range(EXAMPLES // batch_size)
    ]
    task.setup = before
    np.testing.assert_array_equal(np.asarray(data["ids"]).reshape(EXAMPLES, -1), np.vstack(batches))


def test_a_run_agrees_with_the_optimizer_alone(
    problem: training.Problem, quick_to_compile: None
) -> None:
    """The gradients of whole batches, in a loop over steps, give the same losses."""
    outcome = training.program(problem, make, BATCH)(RATE, SEED)
    params, data = problem.start(SEED)
    expected = jax.jit(problem.task.init)(jax.random.key(SEED, impl=KEYS))
    for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # programs compiled in two ways
    steps = EXAMPLES // BATCH
    tx = make(training.schedule(RATE, steps))

    @jax.jit
    def step(params: Tree, state: Tree, batch: jax.Array) -> tuple[Tree, Tree, jax.Array]:
        loss, gradients = problem.gradient(params, {"ids": batch})
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = jax.jit(tx.init)(params), []
    for batch in np.asarray(data["ids"]).reshape(steps, BATCH, -1):
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    # float32, whose sums are in another order; a few steps let the difference grow.
    np.testing.assert_allclose(outcome.curve, losses, rtol=1e-5)
    batches = problem.task.held_out()
    measure = jax.jit(problem.task.measure)
    sums = np.array([measure(params, batch)["loss"] for batch in batches], np.float64)
    np.testing.assert_allclose(outcome.metrics["loss"], sums[:, 0].sum() / sums[:, 1].sum(), 1e-5)


def test_the_noise_scale_of_a_step_is_that_of_the_formula(
    problem: training.Problem, quick_to_compile: None
) -> None:
    measured = training.noise_scales(problem, make, EXAMPLES, RATE, SEED, decay=0.0)
    assert measured.shape == (1,)
    params, data = problem.start(SEED)
    parts = [{"ids": data["ids"][i]} for i in range(EXAMPLES // MICRO)]
    gradient = jax.jit(problem.gradient)
    gradients = [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient(params, part)[1])])
        for part in parts
    ]
    g = np.array(gradients, np.float64)
    mean = g.mean(0)
    trace = (MICRO * (g**2).sum() - EXAMPLES * (mean**2).sum()) / (len(g) - 1)
    square = (mean**2).sum() - trace / EXAMPLES
    assert square > 0
    np.testing.assert_allclose(
        measured[0], trace / square, rtol=1e-3
    )  # a difference of close numbers


def test_the_schedule_peaks_at_the_rate_and_is_never_0() -> None:
    for steps in (16, 100):
        rates = np.array([training.schedule(0.3, steps)(step) for step in range(steps)])
        assert rates.max() == pytest.approx(0.3)
        assert rates.argmax() == round(0.1 * steps) - 1
        assert (rates > 0).all()


def test_points_of_a_curve_are_at_the_middle_of_their_steps() -> None:
    np.testing.assert_array_equal(training.curve_steps(3), [0, 1, 2])
    at = training.curve_steps(4 * training.POINTS)
    assert len(at) == training.POINTS
    assert at[:2].tolist() == [1.5, 5.5]
