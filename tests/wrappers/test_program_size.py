"""Tests that the size of compiled programs is linear in the number of leaves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optim_zoo import accumulation, clip_by_global_norm, guards, lamb, metrics, precision
from tests import cover, quick
from tests.test_contract import PLAIN
from tests.wrappers.test_wrappers import WRAPPERS

Tx = optax.GradientTransformation
SIDE = 8


def _stack(inner: Tx | None = None) -> Tx:
    """Returns the stack of wrappers in docs/concepts.md."""
    tx = inner or optax.chain(clip_by_global_norm(1.0), lamb(1e-3, weight_decay=0.01))
    tx = precision.master_weights(metrics.with_metrics(tx))
    return accumulation.accumulate(guards.skip_nonfinite(tx), every=4)


def _lamb() -> Tx:
    return lamb(1e-3, weight_decay=0.01)


def _around(*names: str) -> Callable[[], Tx]:
    """Returns a function that makes LAMB in these wrappers, outermost first."""

    def make() -> Tx:
        tx: Tx = _lamb()
        for name in reversed(names):
            tx = WRAPPERS[name](tx)
        return tx

    return make


NESTED: list[tuple[str, ...]] = [
    ("skip_nonfinite", "skip_spikes"),
    ("skip_nonfinite", "accumulate"),
    ("accumulate", "skip_spikes"),
    ("accumulate", "accumulate"),
    ("skip_nonfinite", "skip_nonfinite", "with_metrics"),
    ("store_state", "skip_nonfinite"),
    ("stochastic_rounding", "accumulate", "skip_spikes", "with_metrics"),
    ("master_weights", "skip_spikes", "accumulate", "skip_nonfinite"),
]


def _step(tx: Tx) -> Callable[..., Any]:
    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _lower_on_one_device(tx: Tx, params: Any, state: Any) -> Any:
    return jax.jit(_step(tx), donate_argnums=(0, 1)).lower(params, state, params)


def _lower_under_jit(tx: Tx, params: Any, state: Any) -> Any:
    """Shards parameters, gradients and state over the devices, as in ZeRO-3."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def sharding(x: Any) -> NamedSharding:
        return NamedSharding(mesh, P("data") if x.shape == (SIDE, SIDE) else P())

    placed = tuple(jax.tree.map(sharding, tree) for tree in (params, state, params))
    with jax.set_mesh(mesh):
        return jax.jit(
            _step(tx), donate_argnums=(0, 1), in_shardings=placed, out_shardings=placed[:2]
        ).lower(params, state, params)


def _lower_in_shard_map(tx: Tx, params: Any, state: Any) -> Any:
    """Replicates the parameters and shards the batch over the devices."""
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))

    def step(params: Any, state: Any, gradients: Any) -> Any:
        gradients = jax.tree.map(lambda g: jax.lax.pmean(g, "data"), gradients)
        return _step(tx)(params, state, gradients)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8 * SIDE, SIDE), x.dtype), params)
    return jax.jit(mapped, donate_argnums=(0, 1)).lower(params, state, stacked)


def _lower_in_pmap(tx: Tx, params: Any, state: Any) -> Any:
    params, state = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape), x.dtype), tree)
        for tree in (params, state)
    )
    return jax.pmap(_step(tx), "data", donate_argnums=(0, 1)).lower(params, state, params)


def _growth(
    tx: Tx,
    lower: Callable[[Tx, Any, Any], Any] = _lower_on_one_device,
    leaves: tuple[int, int] = (30, 60),
    dtype: str = "float32",
) -> float:
    """Returns the ratio of the lengths of the compiled programs for both numbers of leaves."""
    lines = []
    for count in leaves:
        shape = jax.ShapeDtypeStruct((SIDE, SIDE), dtype)
        params = {f"layer_{i}": shape for i in range(count)}
        lowered = lower(tx, params, jax.eval_shape(tx.init, params))
        # The options are those of LLVM: XLA's passes, and so the program's text, are the same.
        compiled = lowered.compile(compiler_options=quick.FEWER_LLVM_PASSES)
        lines.append(len(compiled.as_text().splitlines()))
    return lines[1] / lines[0]


# One without a norm, one with a norm of each layer, and two with branches: RAdam's and Ranger's.
SOME_OPTIMIZERS = ("lamb", "radam", "ranger", "sgd")


@pytest.mark.parametrize("name", cover.mostly_slow({name: name for name in PLAIN}, SOME_OPTIMIZERS))
def test_the_program_of_an_optimizer_is_linear(name: str) -> None:
    assert _growth(PLAIN[name](0.1)) < 2.3


slow = pytest.mark.slow
# `store_state` with a second moment compiles slowly: it draws random numbers for every leaf.
ALONE = {name: name for name in WRAPPERS if name != "accumulate-1"}
# The README's stack, which a plain pytest also compiles, consists of the others.
NOT_IN_THE_STACK = ("average_parameters", "skip_spikes", "stochastic_rounding")


@pytest.mark.parametrize("name", cover.mostly_slow(ALONE, NOT_IN_THE_STACK))
def test_the_program_of_a_wrapper_is_linear(name: str) -> None:
    assert _growth(_around(name)()) < 2.3


def test_the_program_of_a_bfloat16_state_is_linear() -> None:
    assert _growth(precision.store_state(_lamb(), {"mu": "bfloat16"})) < 2.3


SOME = [_stack, _around(*NESTED[0])]
IDS = ["README", "two guards"]


@pytest.mark.parametrize("make", cover.mostly_slow(dict(zip(IDS, SOME, strict=True)), IDS[:1]))
def test_the_program_of_a_stack_is_linear(make: Callable[[], Tx]) -> None:
    assert _growth(make()) < 2.3


@pytest.mark.parametrize(
    "lower",
    [
        pytest.param(_lower_under_jit, marks=slow),
        pytest.param(_lower_in_shard_map, marks=slow),
        pytest.param(_lower_in_pmap, marks=slow),
    ],
)
def test_the_program_of_a_stack_on_eight_devices_is_linear(lower: Callable[..., Any]) -> None:
    assert _growth(_stack(), lower) < 2.3


@slow
@pytest.mark.parametrize("name", [*WRAPPERS, "two guards"])
@pytest.mark.parametrize("lower", [_lower_under_jit, _lower_in_shard_map, _lower_in_pmap])
def test_the_program_of_a_wrapper_on_eight_devices_is_linear(
    lower: Callable[..., Any], name: str
) -> None:
    make = SOME[1] if name == "two guards" else _around(name)
    assert _growth(make(), lower) < 2.3


@slow
@pytest.mark.parametrize("names", NESTED, ids=" ".join)
def test_the_program_of_nested_wrappers_is_linear(names: tuple[str, ...]) -> None:
    assert _growth(_around(*names)()) < 2.3


@slow
@pytest.mark.parametrize("wrapper", ["skip_nonfinite", "skip_spikes", "accumulate"])
@pytest.mark.parametrize("name", PLAIN)
def test_the_program_of_a_wrapper_around_any_optimizer_is_linear(name: str, wrapper: str) -> None:
    assert _growth(WRAPPERS[wrapper](PLAIN[name](0.1))) < 2.3


@slow
@pytest.mark.parametrize("name", ["stochastic_rounding", "master_weights", "skip_nonfinite"])
def test_the_program_for_bfloat16_parameters_is_linear(name: str) -> None:
    assert _growth(_around("accumulate", name)(), dtype="bfloat16") < 2.3


@slow
@pytest.mark.parametrize("make", [*SOME, _around("store_state")], ids=[*IDS, "store_state"])
def test_the_program_for_many_leaves_is_linear(make: Callable[[], Tx]) -> None:
    """Compares 50 with 200 leaves. Parts that do not depend on them lower the ratio below 4."""
    assert _growth(make(), leaves=(50, 200)) < 4.05


class _Counter:
    """LAMB that counts how often its update is traced."""

    def __init__(self) -> None:
        self.traces = 0
        inner = optax.with_extra_args_support(_lamb())

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            self.traces += 1
            return inner.update(updates, state, params, **extra)

        self.tx = optax.GradientTransformationExtraArgs(inner.init, update)


@pytest.mark.usefixtures("leak_checks")
@pytest.mark.parametrize("names", [*((name,) for name in WRAPPERS), *NESTED], ids=" ".join)
def test_the_inner_update_is_traced_once(names: tuple[str, ...]) -> None:
    counter = _Counter()
    tx: Tx = counter.tx
    for name in reversed(names):
        tx = WRAPPERS[name](tx)
    params = {name: jnp.zeros((2, 2)) for name in "ab"}
    state = jax.eval_shape(tx.init, params)
    with jax.checking_leaks():
        jax.jit(_step(tx)).trace(params, state, params)
    assert counter.traces == 1
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    mapped = jax.shard_map(_step(tx), mesh=mesh, in_specs=P(), out_specs=P())
    jax.jit(mapped).trace(params, state, params)
    assert counter.traces == 2
