"""Runs the checks of optax's own aliases on every optimizer and every wrapper.

They check types and structures; test_contract.py checks numbers.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optim_zoo import accumulation, averaging, guards, lamb, metrics, precision, registry, sharding
from tests import quick
from tests.test_contract import CONSTRUCTORS

Tx = optax.GradientTransformation

WRAPPERS: dict[str, Callable[[Any], Tx]] = {
    "master_weights": lambda rate: precision.master_weights(lamb(rate)),
    "stochastic_rounding": lambda rate: precision.stochastic_rounding(
        lamb(rate), jax.random.key(0)
    ),
    "store_state": lambda rate: precision.store_state(lamb(rate), {"mu": "bfloat16"}),
    "accumulate": lambda rate: accumulation.accumulate(lamb(rate), 2),
    "skip_nonfinite": lambda rate: guards.skip_nonfinite(lamb(rate), 3),
    "skip_spikes": lambda rate: guards.skip_spikes(lamb(rate)),
    "average_parameters": lambda rate: averaging.average_parameters(lamb(rate)),
    "average_uniformly": lambda rate: averaging.average_uniformly(lamb(rate)),
    "with_metrics": lambda rate: metrics.with_metrics(lamb(rate)),
}
EVERY: dict[str, Callable[..., Tx]] = {**CONSTRUCTORS, **WRAPPERS}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
optimizers = pytest.mark.parametrize("make", CONSTRUCTORS.values(), ids=CONSTRUCTORS)


def _params(dtype: str = "float32") -> Any:
    return {"kernel": jnp.ones((2, 3), dtype), "bias": jnp.full(2, 0.5, dtype)}


def _types(tree: Any) -> Any:
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def test_every_wrapper_is_tested() -> None:
    """`WRAPPERS` holds every function of these modules that takes a transformation."""
    found = {
        name
        for module in (precision, accumulation, guards, metrics, averaging)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_")
        if value.__module__.startswith("optim_zoo.wrappers")
        if next(iter(inspect.signature(value).parameters), "") == "inner"
    }
    assert found == set(WRAPPERS)


@every
def test_extra_arguments_are_accepted(make: Callable[..., Tx]) -> None:
    """An optimizer ignores arguments it does not know, because others in a chain may use them."""
    tx = optax.with_extra_args_support(make(0.1))
    state = jax.eval_shape(tx.init, _params())
    updates, after = jax.eval_shape(
        lambda g, s, p: tx.update(g, s, p, value=1.0, grad=g, unknown="text"),
        _params(), state, _params(),
    )  # fmt: skip
    assert _types(updates) == _types(_params())
    assert _types(after) == _types(state)


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_updates_have_the_dtype_of_the_parameters(make: Callable[..., Tx], dtype: str) -> None:
    """The state keeps its dtypes too, over several steps in a scan."""
    tx, params = make(0.1), _params(dtype)

    def train(params: Any, state: Any) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=3)[0]

    state = jax.eval_shape(tx.init, params)
    assert _types(jax.eval_shape(train, params, state)) == _types((params, state))


@every
def test_init_accepts_shapes(make: Callable[..., Tx]) -> None:
    """A direct call, as for a sharded state, gives the types of ``jax.eval_shape``."""
    tx = make(0.1)
    shapes = jax.eval_shape(_params)
    planned = tx.init(shapes)
    assert _types(planned) == _types(jax.eval_shape(tx.init, shapes))


@every
def test_hyperparameters_can_be_injected(make: Callable[..., Tx]) -> None:
    """The inner state has the types of the state without injection."""
    tx = optax.inject_hyperparams(make)(learning_rate=0.1) if make in CONSTRUCTORS.values() else (
        optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(learning_rate=0.1)
    )  # fmt: skip
    params = _params()
    state = jax.eval_shape(tx.init, params)
    assert _types(state.inner_state) == _types(jax.eval_shape(make(0.1).init, params))
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert _types(updates) == _types(params)
    assert _types(after) == _types(state)
    assert optax.tree.get(state, "learning_rate").shape == ()


@optimizers
def test_names_in_a_state_are_unique(make: Callable[..., Tx]) -> None:
    """``optax.tree.get`` raises if a name occurs twice."""
    injected = optax.inject_hyperparams(make)(learning_rate=0.1)
    state = jax.eval_shape(injected.init, _params())
    assert optax.tree.get(state, "learning_rate").shape == ()
    alone = jax.eval_shape(make(0.1).init, _params())
    for name in ("count", "learning_rate", "mu", "nu", "momentum", "slow"):
        found = optax.tree.get(alone, name)
        assert found is None or jax.tree.leaves(found)


@every
def test_multi_steps_accumulates_gradients(make: Callable[..., Tx]) -> None:
    tx = optax.MultiSteps(make(0.1), every_k_schedule=2)
    params = _params()
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert _types(updates) == _types(params)
    assert _types(after) == _types(state)


@every
def test_leaves_can_be_frozen_and_masked(make: Callable[..., Tx]) -> None:
    """A frozen leaf gets zero updates; a masked one is unchanged and has no state."""
    params = _params()
    labels = {"kernel": "trained", "bias": "frozen"}
    frozen = optax.partition({"trained": make(0.1), "frozen": optax.set_to_zero()}, labels)
    masked = optax.masked(make(0.1), {"kernel": True, "bias": False})
    with jax.disable_jit():
        updates, _ = frozen.update(params, frozen.init(params), params)
        assert not np.any(updates["bias"])
        state = masked.init(params)
        updates, after = masked.update(params, state, params)
        np.testing.assert_array_equal(updates["bias"], params["bias"])
    assert _types(after) == _types(state)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert not [x for x in floats if x.shape == params["bias"].shape]


@every
def test_a_sharded_step_compiles_once(make: Callable[..., Tx]) -> None:
    """Parameters and moments keep the sharding that they have after ``init``."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    params = {"kernel": jax.device_put(jnp.ones((2, 3)), rows)}
    tx = make(0.1)

    @quick.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    # With `tx.init`, scalars would be on one device before the first step and replicated after it.
    state = sharding.init(tx, params, mesh=mesh)
    like = [x.ndim > 1 for x in jax.tree.leaves(state)]
    for _ in range(2):
        params, state = step(params, state)
    assert step._cache_size() == 1
    assert params["kernel"].sharding.is_equivalent_to(rows, 2)
    kept = [x for x, is_like in zip(jax.tree.leaves(state), like, strict=True) if is_like]
    assert all(x.sharding.is_equivalent_to(rows, 2) for x in kept)


def test_every_optimizer_of_the_registry_is_tested() -> None:
    assert set(CONSTRUCTORS) == set(registry.OPTIMIZERS)
