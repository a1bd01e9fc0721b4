"""The compiled step: its memory and its collective operations, with all of XLA's optimizations."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from optim_zoo import lamb, sharding
from tests.sharding.problem import FSDP, data_mesh, many_params, mean_loss

pytestmark = pytest.mark.newest
every_mode = pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])


@every_mode
def test_a_step_can_be_compiled_without_arrays(params: Any, batches: list[Any], mode: str) -> None:
    step = sharding.data_parallel(mean_loss, lamb(0.1), mesh=data_mesh(8), mode=mode)
    shapes = jax.eval_shape(lambda: params)
    memory = step.lower(shapes, batches[0]).compile().memory_analysis()
    held = 4 * (3 * 30 + 4 * 2 + 2)  # parameters and moments, norms of two layers, count and rate
    # Each device holds two rows of the batch and a copy of everything else. XLA leaves out what the
    # step does not read, and may align what it does.
    rows = sum(x.nbytes for x in jax.tree.leaves(batches[0])) // 8
    assert 0.8 * held < memory.argument_size_in_bytes < 1.5 * (held + rows)


def test_the_compiled_memory_is_that_of_the_sharded_state() -> None:
    params = {"x": jax.ShapeDtypeStruct((1024, 64), jnp.float32)}

    def argument_bytes(**placing: Any) -> int:
        step = sharding.data_parallel(
            lambda params, batch: jnp.mean((batch @ params["x"]) ** 2),
            lamb(0.1),
            mesh=data_mesh(8),
            **placing,
        )
        lowered = step.lower(params, jax.ShapeDtypeStruct((8, 1024), jnp.float32))
        return lowered.compile().memory_analysis().argument_size_in_bytes

    size, small = 4 * 1024 * 64, 4 * 1024 + 256  # small: a row of the batch, and the scalars
    assert 3 * size < argument_bytes() < 3 * size + small
    assert 1.25 * size < argument_bytes(zero1="data") < 1.25 * size + small
    sharded = {"zero1": "data", "param_shardings": [("x", P("data"))]}
    assert 0.375 * size < argument_bytes(**sharded) < 0.375 * size + small


def test_low_precision_gradients_are_added_in_float32(batches: list[Any]) -> None:
    """In bfloat16, each of the seven small terms is half an ulp of 1 and would be lost."""
    small = np.full((8, 1), 2.0**-9, np.float32)
    small[0] = 1
    step = sharding.data_parallel(
        lambda params, batch: jnp.sum(params["w"] * batch["x"].astype("bfloat16")),
        optax.GradientTransformation(lambda params: (), lambda g, s, p: (g, s)),
        mesh=data_mesh(8),
        mode="shard_map",
    )
    params, state = step.init({"w": jnp.zeros((), "bfloat16")})
    lowered = step.lower(params, {"x": small}).as_text()
    (reduced,) = re.findall(r"all_reduce.*?\(tensor<(\w+)>\) -> tensor<\w+>", lowered, re.DOTALL)[
        :1
    ]
    assert reduced == "f32"
    moved, _, _ = step(params, state, {"x": small})
    np.testing.assert_array_equal(moved["w"], jnp.bfloat16((1 + 7 * 2.0**-9) / 8))


@pytest.mark.parametrize(
    "options",
    [{}, {"zero1": "data"}, {"param_shardings": FSDP}, {"mode": "shard_map"}],
    ids=["jit", "zero1", "fsdp", "shard_map"],
)
def test_gradients_are_added_over_devices_once_a_step(
    rng: np.random.Generator, batches: list[Any], options: Any
) -> None:
    """They are not added in every micro-batch, nor in the dtype of the model's arithmetic.

    A loop over micro-batches is a computation of its own in the compiled program, with a scan over
    the model's layers inside.
    """

    def loss(params: Any, batch: Any) -> jax.Array:
        def layer(hidden: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(hidden @ w.astype("bfloat16")), None

        hidden = (batch["x"] @ params["hidden"]).astype("bfloat16")
        hidden, _ = jax.lax.scan(layer, hidden, params["layers"])
        return jnp.mean((hidden.astype("float32") @ params["out"] - batch["y"]) ** 2)

    params = {**many_params(rng), "layers": jnp.zeros((3, 16, 16))}
    step = sharding.data_parallel(loss, lamb(0.1), mesh=data_mesh(8), micro_batches=2, **options)
    text = step.lower(params, batches[0]).compile().as_text()
    computation, reduced = "", []
    for line in text.splitlines():
        if line and not line.startswith(" "):
            computation = line
        if re.search(r"\b(all-reduce|reduce-scatter)(-start)?\(", line):
            # A branch computes a norm again if its sum of squares is out of range: scalars.
            result = line.split(" = ")[1].split(" all-reduce")[0]
            if not computation.startswith("ENTRY"):
                assert re.fullmatch(r"\(?(f32\[\](, )?)+\)?", result), line
                continue
            reduced.append(line)
    assert reduced
    assert not any("bf16" in line.split("(")[0] for line in reduced)
