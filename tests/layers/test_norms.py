"""Tests that norms of bfloat16 arrays keep no float32 copy of the array in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from optim_zoo import (
    clip_by_global_norm,
    lamb,
    lars,
    lars_ema,
    layerwise_adaptive,
    metrics,
    ports,
    scale_by_adam,
)
from optim_zoo.layers import norms

# Temporary memory relative to the parameters. LAMB stores the float32 direction of one leaf, which
# takes twice the memory of that leaf; the others store only scalars.
ONE_DIRECTION, NOTHING = 0.2, 0.02
LARS = ports.pytorch_optimizer.LARS
UPDATES: dict[str, tuple[Callable[[], optax.GradientTransformation], float]] = {
    "lamb": (lambda: lamb(0.1, weight_decay=0.1), ONE_DIRECTION),
    "lars": (lambda: lars(0.1), NOTHING),
    "lars-outside": (lambda: lars(0.1, lr_inside_momentum=False, nesterov=True), NOTHING),
    "lars_ema": (lambda: lars_ema(0.1, weight_decay=0.1), NOTHING),
    "layerwise_adaptive": (lambda: layerwise_adaptive(scale_by_adam(), 0.1), ONE_DIRECTION),
    "clipped lamb": (lambda: optax.chain(clip_by_global_norm(1.0), lamb(0.1)), ONE_DIRECTION),
    "lamb with metrics": (lambda: metrics.with_metrics(lamb(0.1)), ONE_DIRECTION),
    "apex.FusedLAMB": (ports.apex.FusedLAMB, ONE_DIRECTION),
    "timm.Lamb": (ports.timm.Lamb, ONE_DIRECTION),
    "mlperf.LAMBOptimizer": (lambda: ports.mlperf.LAMBOptimizer(0.1), ONE_DIRECTION),
    "mlperf.LARSOptimizer": (lambda: ports.mlperf.LARSOptimizer(0.1), NOTHING),
    "pytorch_optimizer.LARS": (lambda: LARS(0.1, weight_decay=0.1), NOTHING),
}


@pytest.mark.diagonal
@pytest.mark.parametrize("gradients", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", UPDATES)
def test_updates_of_bfloat16_store_no_float32_copies(name: str, gradients: str) -> None:
    make, most = UPDATES[name]
    tx = make()

    def step(params: Any, state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    leaves, size = 12, 256
    params, g = (
        {f"layer_{i}": jax.ShapeDtypeStruct((size, size), dtype) for i in range(leaves)}
        for dtype in ("bfloat16", gradients)
    )
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, g).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes / (2 * leaves * size**2)
    assert temporaries < most


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
def test_programs_for_accelerators_have_no_barrier(platform: str) -> None:
    tx = optax.chain(clip_by_global_norm(1.0), lamb(0.1))
    params = {name: jnp.ones((8, 8), "bfloat16") for name in "abc"}
    step = jax.jit(lambda params: tx.update(params, tx.init(params), params))
    assert "optimization_barrier" in step.trace(params).lower().as_text()
    text = step.trace(params).lower(lowering_platforms=(platform,)).as_text()
    assert "optimization_barrier" not in text


# The branch for squares that overflow has one barrier, the conversion of bfloat16 another one.
@pytest.mark.parametrize(("dtype", "barriers"), [("float16", 0), ("float32", 1), ("bfloat16", 2)])
def test_only_bfloat16_needs_a_barrier_outside_the_branch(dtype: str, barriers: int) -> None:
    text = jax.jit(norms.norm).lower(jnp.ones((8, 8), dtype)).as_text()
    assert text.count("optimization_barrier") == barriers


X = np.linspace(-2, 3, 8 * 24).reshape(8, 24)


def _one(x: jax.Array) -> jax.Array:
    return norms.norm(x)


def _mapped(check_vma: bool) -> Callable[[jax.Array], jax.Array]:
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    names = () if check_vma else ("data",)
    return jax.shard_map(
        lambda x: norms.norm(x, (), names),
        mesh=mesh,
        in_specs=jax.P("data"),
        out_specs=jax.P(),
        check_vma=check_vma,
    )


def _explicit(x: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        return jax.jit(_one)(jax.device_put(x, jax.P("data")))


WHOLE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "eager": _one,
    "jit": jax.jit(_one),
    "explicit mesh": _explicit,
    "shard_map": lambda x: jax.jit(_mapped(True))(x),
    "shard_map without types": lambda x: jax.jit(_mapped(False))(x),
    "pmap": lambda x: jax.pmap(lambda x: norms.norm(x, (), ("data",)), "data")(x)[0],
    "scan": lambda x: jax.lax.scan(lambda c, x: (c, norms.norm(x)), 0, x[None])[1][0],
    "cond": jax.jit(lambda x: jax.lax.cond(x[0, 0] < 0, _one, lambda x: jnp.float32(0), x)),
    "vmap": lambda x: jnp.linalg.norm(jax.vmap(_one)(x)),
}


@pytest.mark.parametrize("how", WHOLE)
def test_norm_of_bfloat16_under_every_transformation(how: str) -> None:
    x = jnp.asarray(X, "bfloat16")
    # Sums of 192 squares in float32, in different orders, differ by about 1e-6.
    np.testing.assert_allclose(WHOLE[how](x), np.linalg.norm(np.float64(x)), rtol=3e-6)


def test_norm_of_bfloat16_is_differentiable() -> None:
    x = jnp.asarray(X, "bfloat16")
    gradient = jax.jit(jax.grad(norms.norm))(x)
    expected = np.float64(x) / np.linalg.norm(np.float64(x))
    # The gradient is rounded to bfloat16 twice, each time by up to 2^-9.
    np.testing.assert_allclose(np.float32(gradient), expected, rtol=2**-7)
    tangent = jax.jit(lambda x: jax.jvp(norms.norm, (x,), (x,))[1])(x)
    np.testing.assert_allclose(tangent, np.linalg.norm(np.float64(x)), rtol=2**-7)


def test_norm_of_bfloat16_under_x64() -> None:
    with jax.enable_x64(True):
        norm = jax.jit(norms.norm)(jnp.asarray(X, "bfloat16"))
        assert norm.dtype == "float32"
