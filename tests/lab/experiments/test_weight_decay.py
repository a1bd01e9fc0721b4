"""The experiment with weight decay: what is exact, the maps, and a quick run of the command."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from optim_zoo import cli
from optim_zoo.lab.experiments import EXPERIMENTS
from optim_zoo.lab.experiments.weight_decay import maps, two_coordinates
from optim_zoo.train.random_numbers import KEYS

SCALE = maps.Scale((1e-3, 1e-2, 1e-1), (0, 1), 3, 4, 2, 3, 1)


# Two coordinates


def adam_with_l2(scale: float, sign: float) -> np.ndarray:
    """Returns the parameter after every step, from the formulas of the papers, in float64."""
    x, mu, nu, found = 1.0, 0.0, 0.0, []
    for t, z in enumerate(sign * two_coordinates.signs(), 1):
        gradient = scale * z + two_coordinates.WEIGHT_DECAY * x
        mu = 0.9 * mu + 0.1 * gradient
        nu = 0.999 * nu + 0.001 * gradient**2
        corrected = (mu / (1 - 0.9**t)) / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8)
        x -= two_coordinates.LEARNING_RATE * corrected
        found.append(x)
    return np.array(found)


def test_two_coordinates_have_the_exact_numbers() -> None:
    kept = two_coordinates.kept()
    steps = np.arange(1, two_coordinates.STEPS + 1)
    remains = (1 - two_coordinates.LEARNING_RATE * two_coordinates.WEIGHT_DECAY) ** steps
    # The gradients cancel in the mean of two runs up to the rounding of 1,000 steps; AdamW's eps
    # of 1e-8 cancels too, as both signs have the same second moment.
    for name in ("SGD, L2", "SGD, decoupled", "AdamW"):
        for coordinate in range(2):
            np.testing.assert_allclose(kept[name][:, coordinate], remains, rtol=1e-9)
    for coordinate, scale in enumerate(two_coordinates.SCALES):
        expected = (adam_with_l2(scale, 1) + adam_with_l2(scale, -1)) / 2
        np.testing.assert_allclose(kept["Adam, L2"][:, coordinate], expected, rtol=1e-9)
    assert round(remains[-1], 4) == 0.3677
    assert [round(float(share), 4) for share in kept["Adam, L2"][-1]] == [0.3684, 0.9901]


# Maps


def test_every_cell_of_a_map_is_a_run_of_its_own(quick_to_compile: None) -> None:
    """The program of all cells agrees with a loop over the steps of one."""
    form = dataclasses.replace(maps.FORMS[2], decays=(0.0, 0.5, 0.02))
    found = maps.measure(form, SCALE)
    assert found.loss.shape == (3, 3, 2)
    decay, rate, seed = 1, 2, 1
    task = maps._task(SCALE, seed)
    tx = form.make(SCALE.rates[rate], form.decays[decay], SCALE.steps)
    params = task.init(jax.random.key(seed, impl=KEYS))
    state = tx.init(params)

    @jax.jit
    def gradient(params, batch):
        return jax.grad(lambda params: task.loss(params, batch).total / SCALE.batch_size)(params)

    for number in range(SCALE.steps):
        batch = task.batch(number % SCALE.batches, task.setup.stages[0])
        updates, state = tx.update(gradient(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    (held_out,) = task.held_out()
    total, weight = task.measure(params, held_out)["loss"]
    # float32, whose matrix products add in another order under vmap.
    np.testing.assert_allclose(found.loss[decay, rate, seed], total / weight, rtol=1e-5)
    assert np.unique(found.loss.round(6)).size == found.loss.size  # no two cells are one run


def a_map(loss: list[list[float]]) -> maps.Map:
    """Returns a map, (decays, rates), with one seed."""
    values = np.array(loss)[:, :, None]
    form = dataclasses.replace(maps.FORMS[0], decays=(0.0, 0.1, 1.0)[: len(loss)])
    scale = dataclasses.replace(SCALE, seeds=(0,), rates=SCALE.rates[: len(loss[0])])
    return maps.Map(form, scale, values, values)


def test_moving_a_decay_costs_nothing_if_it_is_best_at_every_rate() -> None:
    assert a_map([[2.0, 3.0], [1.0, 1.5]]).cost_of_moving() == [0.0]


def test_the_cost_of_moving_is_the_geometric_mean_of_both_directions() -> None:
    cost = a_map([[1.0, 3.0], [4.0, 1.5]]).cost_of_moving()  # ratios: 3 / 1.5 and 4 / 1
    np.testing.assert_allclose(cost, np.sqrt(2 * 4) - 1, rtol=1e-12)


def test_a_rate_that_is_too_bad_or_diverged_is_not_usable() -> None:
    one = a_map([[1.0, 3.0, np.nan], [4.0, 2.5, np.nan]])
    assert one.usable() == [0]
    assert one.best() == (0, 0)
    assert one.cost_of_moving() == [0.0]
    assert [row["status"] for row in one.rows()].count("diverged") == 2


# The command


def test_the_list_has_one_experiment_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    assert all(name == name.lower() for name in EXPERIMENTS)


def test_an_unknown_experiment_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "weightdecay"]) == 2
    assert "did you mean weight-decay?" in capsys.readouterr().err


def test_a_quick_run_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_to_compile: None
) -> None:
    assert cli.main(["reproduce", "weight-decay", "--quick", f"--dir={tmp_path / 'new'}"]) == 0
    assert "time: " in capsys.readouterr().out.splitlines()[-1]
    written = {path.name for path in (tmp_path / "new").iterdir()}
    page = (tmp_path / "new" / "weight_decay.md").read_text()
    results = (tmp_path / "new" / "results.jsonl").read_text()
    plots = {name for name in written if name.endswith(".png")}
    assert written == {"results.jsonl", "weight_decay.md", *plots}
    assert len(plots) == 2
    assert all(f"]({name})" in page for name in plots)
    assert "its figures mean nothing" in page
    rows = [json.loads(line) for line in results.splitlines()]
    keys = ("optimizer", "learning_rate", "decay", "seed")
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows) == 3 * 2 * 2 * 3
