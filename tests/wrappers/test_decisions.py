"""Tests decisions under every JAX transformation, and how guards compile on each platform."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from optim_zoo import accumulation, adamw, clip_by_global_norm, guards, lamb
from optim_zoo.wrappers import decisions

pytestmark = pytest.mark.usefixtures("quick_to_compile")

GO = np.array([True, False, True, True, False, False, True, False])
X = jnp.arange(8.0)


def _decided(x: jax.Array) -> jax.Array:
    """Returns a decision for one number, of shape () or (1,)."""
    x = x.reshape(())
    return decisions.materialized((x == 0) | (x == 2) | (x == 3) | (x == 6))


def _mapped(**options: Any) -> Callable[[jax.Array], jax.Array]:
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    mapped = jax.shard_map(
        lambda x: _decided(x)[None],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        **options,
    )
    return jax.jit(mapped)


def _explicit(x: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        return jax.jit(lambda x: jnp.stack([_decided(each) for each in jnp.unstack(x)]))(x)


EVERYWHERE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "eager": lambda x: jnp.stack([_decided(each) for each in x]),
    "jit": lambda x: jnp.stack([jax.jit(_decided)(each) for each in x]),
    "vmap": jax.vmap(_decided),
    "vmap in jit": jax.jit(jax.vmap(_decided)),
    "scan": lambda x: jax.lax.scan(lambda carry, x: (carry, _decided(x)), 0, x)[1],
    "cond": jax.jit(lambda x: jax.lax.cond(x[0] == 0, jax.vmap(_decided), lambda x: x > 9, x)),
    "shard_map": _mapped(),
    "shard_map without types": _mapped(check_vma=False),
    "pmap": lambda x: jax.pmap(_decided)(x),
    "explicit mesh": _explicit,
}


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("how", EVERYWHERE)
def test_decisions_are_correct_under_every_transformation(how: str, x64: bool) -> None:
    with jax.enable_x64(x64):
        np.testing.assert_array_equal(EVERYWHERE[how](X), GO)


def test_code_around_a_decision_can_be_differentiated() -> None:
    def choose(x: jax.Array) -> jax.Array:
        return jnp.where(_decided(x), 3 * x, 0.0)

    assert jax.jit(jax.grad(choose))(2.0) == 3
    assert jax.jit(jax.grad(choose))(1.0) == 0


PARAMS = {name: jnp.ones((8, 8)) for name in "abc"}


def _branches(tx: optax.GradientTransformation, platform: str) -> int:
    """Returns the number of branches in an update that depend on computed values."""
    step = jax.jit(lambda g, state: tx.update(g, state, PARAMS))
    traced = step.trace(PARAMS, jax.eval_shape(tx.init, PARAMS))
    module = traced.lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")

    def count(operation: Any) -> int:
        within = [inner for region in operation.regions for block in region for inner in block]
        # A choice between platforms is a case that returns an int32 constant; only this platform's
        # branch is compiled.
        types = [str(result.type) for result in operation.results]
        is_choice = operation.name == "stablehlo.case" and len(operation.regions) > 1
        return (is_choice and types != ["tensor<i32>"]) + sum(map(count, within))

    return count(module.operation)


GUARDED = [
    guards.skip_nonfinite(optax.chain(clip_by_global_norm(1.0), lamb(0.1))),
    guards.skip_spikes(adamw(0.1)),
    guards.skip_nonfinite(guards.skip_spikes(lamb(0.1))),
]


@pytest.mark.parametrize("tx", GUARDED, ids=["LAMB", "AdamW", "two guards"])
def test_guards_branch_only_on_cpus(tx: optax.GradientTransformation) -> None:
    assert _branches(tx, "cpu")
    for platform in ("tpu", "cuda", "rocm"):
        assert not _branches(tx, platform)


def test_accumulation_has_one_branch_on_accelerators() -> None:
    tx = accumulation.accumulate(guards.skip_nonfinite(lamb(0.1)), 4)
    for platform in ("tpu", "cuda"):
        assert _branches(tx, platform) == 1


def test_a_guarded_update_needs_no_more_memory_than_its_updates() -> None:
    """The only temporaries are the updates and the directions of one or two leaves."""
    leaves, size = 12, 256
    params = {f"layer_{i}": jax.ShapeDtypeStruct((size, size), "float32") for i in range(leaves)}
    tx = guards.skip_nonfinite(lamb(0.1, weight_decay=0.1))

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < (1 + 2 / leaves) * 4 * leaves * size**2
    assert not re.findall(r"= f32\[256,256\]\S* copy\(", compiled.as_text())


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_devices_that_decide_differently_do_not_wait_for_one_another(how: str) -> None:
    """No branch on a decision of one device has a collective, without the guard's ``axis_name``.

    A norm is computed again in a branch, but on its sum over the devices.
    """
    tx = guards.skip_nonfinite(lamb(0.1, axis_name="data"))

    def step(x: jax.Array) -> Any:
        return tx.update({"x": x}, tx.init({"x": x}), {"x": x})[0]

    mapped = jax.shard_map(
        step,
        mesh=jax.sharding.Mesh(jax.devices(), ("data",)),
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=False,
    )
    function = jax.pmap(step, "data") if how == "pmap" else mapped
    jaxpr = jax.make_jaxpr(function)(jnp.ones((8, 3))).jaxpr
    assert "psum" in str(jaxpr)
    collective = list(_branches_with_psum(jaxpr))
    assert collective
    assert all(_is_same_everywhere(jaxpr, eqn.invars[0]) for jaxpr, eqn in collective)


def test_a_branch_on_the_decision_of_one_device_is_found() -> None:
    """Checks the test above: the sum over the devices is in a branch on one device's own number."""

    def step(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0] > 0, lambda x: jax.lax.psum(x, "data"), lambda x: x, x)

    jaxpr = jax.make_jaxpr(jax.pmap(step, "data"))(jnp.ones((8, 3))).jaxpr
    [(inner, eqn)] = _branches_with_psum(jaxpr)
    assert not _is_same_everywhere(inner, eqn.invars[0])


def _jaxprs(eqn: Any) -> list[Any]:
    """Returns the programs inside an equation."""
    values = jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns"))
    inner = [getattr(value, "jaxpr", value) for value in values]
    return [jaxpr for jaxpr in inner if hasattr(jaxpr, "eqns")]


def _has_psum(jaxpr: Any) -> bool:
    return any(
        "psum" in eqn.primitive.name or any(map(_has_psum, _jaxprs(eqn))) for eqn in jaxpr.eqns
    )


def _branches_with_psum(jaxpr: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every ``cond`` with a sum over devices in a branch, after the program it is in."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond" and any(map(_has_psum, _jaxprs(eqn))):
            yield jaxpr, eqn
        for inner in _jaxprs(eqn):
            yield from _branches_with_psum(inner)


def _is_same_everywhere(jaxpr: Any, variable: Any) -> bool:
    """Returns whether a variable is computed from sums over devices and constants alone."""
    if isinstance(variable, jax.extend.core.Literal) or variable in jaxpr.constvars:
        return True
    for eqn in jaxpr.eqns:
        if variable in eqn.outvars:
            return "psum" in eqn.primitive.name or all(
                _is_same_everywhere(jaxpr, operand) for operand in eqn.invars
            )
    return False  # an argument of the program


@pytest.mark.parametrize("go", [True, False])
@pytest.mark.parametrize("gradient", ["float32", "bfloat16", "another structure"])
def test_a_skipped_step_changes_no_bit(go: bool, gradient: str) -> None:
    """This includes updates whose shapes differ from those of the gradients."""
    nan = jnp.full((2, 3), jnp.nan, "float32" if "structure" in gradient else gradient)
    gradients = [nan] if gradient == "another structure" else {"a": nan, "b": nan[0]}
    x = {"a": jnp.full((2, 3), -0.0), "b": jnp.arange(3.0)}

    def step() -> Any:
        return jax.tree.map(jnp.ones_like, x), {"seen": jnp.float32(1)}

    guarded = jax.jit(lambda go, g: decisions.step_if(go, step, {"seen": jnp.float32(0)}, g))
    updates, state = guarded(go, gradients)
    moved = optax.apply_updates(x, updates)
    expected = jax.tree.map(lambda x: x + 1, x) if go else x
    for each, other in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        assert np.asarray(each).tobytes() == np.asarray(other).tobytes()
    assert state["seen"] == go
