"""The experiment with warmup: what is exact, one run of its own, and a quick run of the command."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from optim_zoo import bert_adamw, cli
from optim_zoo.lab.experiments.warmup import page, training
from optim_zoo.train.random_numbers import KEYS
from optim_zoo.tree import Tree


def test_the_multiplier_is_at_most_6_57_at_step_12() -> None:
    steps = np.arange(1, 10_000)
    found = training.multiplier(steps)
    assert steps[found.argmax()] == 12
    assert round(float(found.max()), 2) == 6.57
    assert round(float(found[0]), 2) == 3.16


@pytest.mark.slow  # a quarter of a minute of compiling
def test_a_run_of_the_program_is_that_of_a_loop(quick_to_compile: None) -> None:
    form = dataclasses.replace(training.FORMS[0], rates=(1e-2,))
    model = training.Model(1, 4, 1, 4)
    scale = dataclasses.replace(training.QUICK, warmups=(0.5,), steps=3, model=model)
    tasks = training.make_tasks(scale)
    with_it, without = (training.measure(form, own, scale, tasks) for own in (True, False))
    # AdamW's ratio is the multiplier, but for eps and weight decay: 1e-6 and 1e-2 |x| next to
    # directions of about 1 for each number.
    exact = training.multiplier(np.arange(1, 4))
    # The learning rate of the first step is 0.
    np.testing.assert_allclose(with_it.ratio[0, 0, :, 1:], np.stack([exact[1:]] * 2), rtol=2e-2)
    task = tasks[1]
    rates = training._rates(1e-2, 0.5, scale.steps)
    assert rates[0] < rates[1]
    tx = bert_adamw(lambda step: jax.numpy.asarray(rates)[step],
                    exclude_from_weight_decay=["bias", "norm"])  # fmt: skip
    params = jax.jit(task.init)(jax.random.key(1, impl=KEYS))

    def mean_loss(params: Tree, batch: Tree) -> jax.Array:
        loss = task.loss(params, batch)
        return loss.total / loss.weight

    @jax.jit
    def step(params: Tree, state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        updates, state = tx.update(jax.grad(mean_loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state, measure = jax.jit(tx.init)(params), jax.jit(task.measure)
    for number in range(scale.steps):
        params, state = step(params, state, task.batch(number, task.setup.stages[0]))
    sums = [measure(params, batch)["loss"] for batch in task.held_out()]
    expected = sum(float(x) for x, _ in sums) / sum(float(weight) for _, weight in sums)
    # float32, whose matrix products add in another order under vmap.
    np.testing.assert_allclose(without.loss[0, 0, 1], expected, rtol=1e-5)


def test_the_reading_follows_the_figures() -> None:
    scale = dataclasses.replace(training.QUICK, seeds=(0, 1))
    loss = np.full((2, 5, 2), 2.0)
    ratio = np.ones((2, 5, 2, scale.steps))
    with_it = training.Measured(training.FORMS[0], True, scale, loss, ratio)
    higher = loss + np.array([0.5, 0.0])[:, None, None]
    without = training.Measured(training.FORMS[0], False, scale, higher, ratio)
    pair = (with_it, without)
    assert page.differences(pair, 0).tolist() == [0.5, 0.5]
    assert page._verdict(pair, scale) == "It is higher for every seed at a warmup of 0 % only."
    assert page._verdict((with_it, with_it), scale) == "At no warmup it is higher for every seed."


@pytest.mark.slow  # half a minute of compiling
def test_a_quick_run_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_to_compile: None
) -> None:
    assert cli.main(["reproduce", "warmup", "--quick", f"--dir={tmp_path / 'new'}"]) == 0
    assert "time: " in capsys.readouterr().out.splitlines()[-1]
    written = {path.name for path in (tmp_path / "new").iterdir()}
    text = (tmp_path / "new" / "warmup.md").read_text()
    assert written == {"results.jsonl", "warmup.md", "warmup_ratios.png", "warmup_losses.png"}
    assert all(f"]({name})" in text for name in written if name.endswith(".png"))
    assert "its figures mean nothing" in text
    rows = [json.loads(x) for x in (tmp_path / "new" / "results.jsonl").read_text().splitlines()]
    keys = ("optimizer", "bias_correction", "warmup", "learning_rate", "seed")
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows) == 2 * 2 * 2 * 5 * 2
