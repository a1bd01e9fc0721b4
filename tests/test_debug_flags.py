"""Tests every optimizer and wrapper under the debugging flags of JAX."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from optim_zoo import lamb
from tests.test_contract import FULL
from tests.wrappers.test_wrappers import WRAPPERS

pytestmark = pytest.mark.usefixtures("quick_to_compile", "leak_checks")


@contextlib.contextmanager
def _flags() -> Iterator[None]:
    """Turns on all debugging flags but ``jax.checking_leaks``."""
    with (
        jax.debug_nans(True),
        jax.debug_infs(True),
        jax.enable_checks(True),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


def _two_steps(make: Callable[[], optax.GradientTransformation], parameters: str) -> None:
    """Makes two steps with parameters of this dtype and float32 gradients; one leaf is zero."""
    shapes = {"stack": (2, 3), "dense": {"kernel": (3, 2), "bias": (2,)}, "norm": {"scale": ()}}
    ones = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    params = jax.tree.map(lambda x: x.astype(parameters), ones)
    params["dense"]["bias"] *= 0
    with _flags():
        tx = make()

        def step(params: Any, state: Any) -> Any:
            updates, state = tx.update(ones, state, params)
            return optax.apply_updates(params, jax.tree.map(_like, updates, params)), state

        # Only tracing can leak, and while JAX looks for leaks it compiles every operation anew.
        state = tx.init(params)
        run = jax.jit(step)
        with jax.checking_leaks():
            jax.eval_shape(tx.init, params)
            for _ in range(2):
                params, state = run(params, state)


def _like(update: jax.Array, parameter: jax.Array) -> jax.Array:
    return update.astype(parameter.dtype)


@pytest.mark.parametrize("name", FULL)
def test_optimizers_work_under_all_debugging_flags(name: str) -> None:
    _two_steps(lambda: FULL[name](0.1), "bfloat16")


@pytest.mark.diagonal
@pytest.mark.parametrize("parameters", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_work_under_all_debugging_flags(name: str, parameters: str) -> None:
    _two_steps(lambda: WRAPPERS[name](lamb(0.1, weight_decay=0.1)), parameters)
