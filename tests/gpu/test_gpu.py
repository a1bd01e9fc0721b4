"""Optimizers on a GPU: numbers, transfers between host and device, memory and kernels.

    OPTIM_ZOO_TEST_DEVICE=gpu pytest tests/gpu     on a machine with an NVIDIA GPU and jax[cuda]
    OPTIM_ZOO_TEST_DEVICE=cpu pytest tests/gpu     the same assertions on the CPU

Run it with `tests/gpu` alone: the variable changes the device of every test in the process.
Without the variable, all tests are skipped.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hlo_kernels
from optim_zoo import adamw, clip_by_global_norm, lamb, lars, metrics, split, stacked

LAYERS = [("stack", stacked(0)), ("qkv", (split(-1, 3)))]
SHAPES = {
    "stack": (4, 96, 80),  # four layers
    "qkv": (128, 3 * 128),  # three layers
    "kernel": (1000, 701),  # a GPU sums this many entries in several blocks
    "bias": (701,),
    "scale": (),
}
NO_DECAY = {"weight_decay": 0.01, "exclude_from_weight_decay": ["bias", "scale"]}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "lamb": lambda: lamb(0.01, **NO_DECAY),
    "lamb of layers in arrays": lambda: lamb(0.01, **NO_DECAY, layers=LAYERS),
    # The norm of the gradients below is about 0.9, so that they are clipped.
    "clipping and lamb": lambda: optax.chain(clip_by_global_norm(0.5), lamb(0.01, **NO_DECAY)),
    "lars": lambda: lars(1.0, **NO_DECAY),
    "lars of layers in arrays": lambda: lars(1.0, **NO_DECAY, layers=LAYERS),
    "adamw": lambda: adamw(0.01, **NO_DECAY),
}
STEPS = 5
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def _step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, metrics.read(state)

    return jax.jit(step, donate_argnums=(0, 1))


def _random(rng: np.random.Generator, scale: float, dtype: str) -> Any:
    return {
        name: np.asarray(scale * rng.standard_normal(shape)).astype(jnp.dtype(dtype))
        for name, shape in SHAPES.items()
    }


def _followed(
    tx: optax.GradientTransformation, rng: np.random.Generator, dtype: str, device: jax.Device
) -> Iterator[tuple[Any, Any, Any]]:
    """Yields the parameters before a step, its gradients, and the parameters after it."""
    params = jax.device_put(_random(rng, 0.02, dtype), device)
    state, step = jax.jit(tx.init)(params), _step(tx)
    for _ in range(STEPS):
        before, gradients = jax.device_get(params), _random(rng, 1e-3, dtype)
        params, state, _ = step(params, state, jax.device_put(gradients, device))
        yield before, gradients, jax.device_get(params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_optimizer
def test_steps_agree_with_the_cpu_in_float64(
    optimizer: str, dtype: str, device: jax.Device, rng: np.random.Generator
) -> None:
    """Compares each step from the same parameters, with a state in float64.

    In bfloat16 the update and the new parameter are rounded, by at most 2^-8 relative to each. In
    float32 the parameter is rounded by 2^-24, and the error of the update, from several operations
    and sums of up to 7e5 squares, is 4e-7 of its largest entry on a CPU. GPUs divide and take roots
    less exactly.
    """
    of_parameter, of_update = (2**-24, 3e-6) if dtype == "float32" else (1.01 * 2**-8,) * 2
    tx = OPTIMIZERS[optimizer]()
    steps = list(_followed(tx, rng, dtype, device))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, "float64"), tree)  # noqa: E731
        update, state = jax.jit(tx.update), tx.init(wide(steps[0][0]))
        for before, gradients, after in steps:
            updates, state = update(wide(gradients), state, wide(before))
            for name, u in jax.device_get(updates).items():
                assert after[name].dtype == dtype
                expected = before[name].astype("float64") + u
                wrong = np.abs(after[name].astype("float64") - expected)
                bound = of_parameter * np.abs(expected) + of_update * np.max(np.abs(u))
                assert np.all(wrong <= bound), name


@every_optimizer
def test_state_stays_on_the_device_and_is_donated(
    optimizer: str, device: jax.Device, rng: np.random.Generator
) -> None:
    tx = OPTIMIZERS[optimizer]()
    params, gradients = (jax.device_put(_random(rng, x, "float32"), device) for x in (0.02, 1e-3))
    state, step = jax.jit(tx.init)(params), _step(tx)
    memory: Any = step.lower(params, state, gradients).compile().memory_analysis()
    # The last step's rate and norms are not read, so XLA does not donate them.
    given = [x for x in jax.tree.leaves((params, state)) if x.size > 100]
    with jax.transfer_guard("disallow"):
        made = step(params, state, gradients)
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in given)
    assert all(x.is_deleted() for x in given)
    assert all(x.devices() == {device} for x in jax.tree.leaves(made))


# Shapes as in BERT. Their numbers of entries differ, because XLA may reshape the arrays.
LARGE = {"a": (768, 3072), "b": (1024, 1024), "c": (768, 768), "d": (512, 768)}
FORMULAS = {
    "lamb": lambda: lamb(0.01, weight_decay=0.01),
    "lars": lambda: lars(1.0, weight_decay=0.01),
    "adamw": lambda: adamw(0.01, weight_decay=0.01),
}


def _compiled(tx: optax.GradientTransformation, dtype: str) -> Any:
    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in LARGE.items()}
    return _step(tx).lower(params, jax.eval_shape(tx.init, params), params).compile()


@pytest.mark.parametrize(("formula", "most"), [("lamb", 1.05), ("lars", 0.05), ("adamw", 0.05)])
def test_the_memory_of_temporaries_is_limited(
    formula: str, most: float, device: jax.Device
) -> None:
    """LAMB's direction is in memory between the two passes over it; the others keep nothing."""
    del device
    memory = _compiled(FORMULAS[formula](), "float32").memory_analysis()
    size = sum(4 * math.prod(shape) for shape in LARGE.values())
    assert memory.temp_size_in_bytes <= most * size


# Upper limits. A trust ratio needs one pass for the norms and one that scales; metrics need none.
# On a CPU, a kernel writes one array (for LAMB mu, nu, direction and parameter, and two norms), and
# XLA writes the squares of bfloat16 as float32 before it sums them.
KERNELS = {
    "gpu": {"lamb": (2, 2), "lars": (2, 2), "adamw": (1, 1)},  # float32, bfloat16
    "cpu": {"lamb": (6, 7), "lars": (4, 6), "adamw": (3, 3)},
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_kernels_on_a_large_leaf(formula: str, device: jax.Device) -> None:
    for dtype, most in zip(("float32", "bfloat16"), KERNELS[device.platform][formula], strict=True):
        text = _compiled(FORMULAS[formula](), dtype).as_text()
        for shape in LARGE.values():
            kernels = hlo_kernels.kernels_on(text, math.prod(shape))
            assert 1 <= len(kernels) <= most, "\n".join(kernel.line for kernel in kernels)
