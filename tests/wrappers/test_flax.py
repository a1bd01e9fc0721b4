"""Tests that the code of docs/flax.md runs and that its TrainState passes loss and weight on."""

import contextlib
import io
import logging
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optim_zoo import accumulation, guards, lamb, metrics, sgd

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PAGE = (Path(__file__).parents[2] / "docs" / "flax.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.zeros(2)}


def _train_state(tx: optax.GradientTransformation) -> Any:
    names: dict[str, Any] = {}
    exec(BLOCKS[0], names)
    return names["TrainState"].create(apply_fn=None, params=PARAMS, tx=tx)


def test_the_page_runs(caplog: pytest.LogCaptureFixture) -> None:
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in BLOCKS:
            exec(block, names)
    assert names["figures"]["loss"] < 0.1
    assert printed.getvalue().splitlines()[-1] == "0"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_subclass_has_at_most_ten_lines() -> None:
    code = BLOCKS[0].partition("class ")[2]
    assert len([line for line in code.splitlines() if line]) <= 10


def test_a_train_state_passes_loss_and_weight_on() -> None:
    """Compares with ``update``: a weighted mean, and a step skipped because of its loss."""
    tx = accumulation.accumulate(guards.skip_nonfinite(sgd(0.1)), 2)
    state, opt_state, params = _train_state(tx), tx.init(PARAMS), PARAMS
    step = jax.jit(lambda state, grads, **extra: state.apply_gradients(grads=grads, **extra))
    for scale, extra in ((1.0, {"value": 1.0, "weight": 3.0}), (2.0, {"value": 2.0}), (9.0, {})):
        grads = jax.tree.map(lambda x, scale=scale: scale * jnp.ones_like(x), PARAMS)
        state = step(state, grads, **extra)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        params = optax.apply_updates(params, updates)
        jax.tree.map(np.testing.assert_array_equal, state.opt_state, opt_state)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), state.params, params)
    np.testing.assert_allclose(state.params["b"], -0.1 * (3 * 1 + 1 * 2) / 4, rtol=1e-6)
    assert state.step == 3
    state = _train_state(guards.skip_nonfinite(lamb(0.1)))
    state = state.apply_gradients(grads=PARAMS, value=jnp.inf)
    assert metrics.read(state)["skipped_steps"] == 1


def test_a_train_state_still_replaces_its_other_fields() -> None:
    state = _train_state(optax.adam(0.1)).apply_gradients(grads=PARAMS, apply_fn=len)
    assert state.apply_fn is len


def test_an_nnx_optimizer_passes_loss_and_weight_on() -> None:
    tx = accumulation.accumulate(guards.skip_nonfinite(sgd(0.1)), 2)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = np.asarray(model.bias[...])
    for scale, weight in ((1.0, 3.0), (2.0, 1.0)):
        grads = jax.tree.map(lambda x, scale=scale: jnp.full_like(x, scale), nnx.state(model))
        optimizer.update(model, grads, value=1.0, weight=weight)
    np.testing.assert_allclose(model.bias[...] - before, -0.125, rtol=1e-6)
    optimizer.update(model, grads, value=jnp.nan)
    assert metrics.read(optimizer)["skipped_micro_batches"] == 1
