"""Tests properties that every optimizer has on generated trees of parameters."""

import dataclasses
import functools
import inspect
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from tests.test_contract import CONSTRUCTORS, Make

pytestmark = pytest.mark.usefixtures("quick_to_compile")

DTYPES = ("float32", "bfloat16", "float16")
# A small fixed set, because each shape is compiled separately.
SHAPES = ((), (1,), (3,), (2, 3), (2, 1, 3), (0,), (0, 3))

every = pytest.mark.parametrize("make", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
settings = functools.partial(hypothesis.settings, deadline=None, derandomize=True, database=None)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Describes one parameter of a generated tree, and its gradients."""

    shape: tuple[int, ...]
    dtype: str
    gradient_dtype: str
    size: str  # size of the gradients: "moderate", "zero", "tiny" or "large"
    seed: int  # random seed; with 0 the parameter is zero

    def parameter(self) -> jax.Array:
        x = np.random.default_rng(self.seed).normal(size=self.shape)
        return jnp.asarray(x if self.seed else 0 * x, self.dtype)

    def gradient(self, step: int) -> jax.Array:
        large = 6e4 if self.gradient_dtype == "float16" else 1e30
        size = {"moderate": 1.0, "zero": 0.0, "tiny": 1e-30, "large": large}[self.size]
        # At most 1, so that the largest gradient is finite in its dtype.
        x = np.random.default_rng([self.seed, step]).uniform(-1, 1, size=self.shape)
        return jnp.asarray(size * x, self.gradient_dtype)


def trees(*sizes: str) -> st.SearchStrategy[Any]:
    """Generates nested containers of `Leaf` and None. Containers may be empty."""
    leaves = st.builds(
        Leaf,
        st.sampled_from(SHAPES),
        st.sampled_from(DTYPES),
        st.sampled_from(DTYPES),
        st.sampled_from(sizes),
        st.integers(0, 4),
    )
    names = st.sampled_from(["kernel", "bias", "norm", "0"])
    return st.recursive(
        leaves | leaves | st.none(),  # two leaves in three
        lambda inside: (
            st.dictionaries(names, inside, max_size=3)
            | st.lists(inside, max_size=3)
            | st.tuples(inside, inside)
        ),
        max_leaves=5,
    ).filter(lambda tree: tree is not None)  # update treats None as missing parameters


def _params(tree: Any) -> Any:
    return jax.tree.map(Leaf.parameter, tree)


def _grads(tree: Any, step: int) -> Any:
    return jax.tree.map(lambda leaf: leaf.gradient(step), tree)


def _types(tree: Any) -> Any:
    """Returns structure, shapes, dtypes and weak types."""
    leaves = jax.tree.leaves(tree)
    return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in leaves]


def _like(tree: Any) -> Any:
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def _assert_no_memory_is_shared(*trees: Any) -> None:
    """Checks that the arrays have distinct buffers; empty arrays have none."""
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(trees) if x.size]
    assert len(set(pointers)) == len(pointers)


def _options(make: Make, **wanted: Any) -> dict[str, Any]:
    return {k: v for k, v in wanted.items() if k in inspect.signature(make).parameters}


@every
@settings(max_examples=8)
@hypothesis.given(tree=trees("moderate", "zero", "tiny", "large"))
def test_state_keeps_its_types_and_no_buffer_is_shared(make: Make, tree: Any) -> None:
    """Makes two steps; Lookahead synchronizes in the second."""
    tx = make(0.1, **_options(make, sync_period=2))
    params = _params(tree)
    state = tx.init(params)
    expected = _types(state)
    _assert_no_memory_is_shared(params, state)
    for step in range(2):
        updates, state = tx.update(_grads(tree, step), state, params)
        assert _like(updates) == _like(params)
        assert _types(state) == expected
        _assert_no_memory_is_shared(params, state)
        # A float16 update may overflow to infinity, so it is not applied; it must not be NaN.
        assert not any(np.isnan(x).any() for x in jax.tree.leaves(updates))


@every
@settings(max_examples=8)
@hypothesis.given(tree=trees("moderate", "zero", "tiny"))
def test_finite_gradients_give_finite_updates(make: Make, tree: Any) -> None:
    tx = make(0.1, **_options(make, sync_period=2, weight_decay=0.01))
    params = _params(tree)
    state = tx.init(params)
    for step in range(2):
        updates, state = tx.update(_grads(tree, step), state, params)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
        params = optax.apply_updates(params, updates)


@every
@settings(max_examples=6)
@hypothesis.given(tree=trees("zero"))
def test_zero_gradients_without_decay_change_nothing(make: Make, tree: Any) -> None:
    tx = make(0.1, **_options(make, sync_period=2, weight_decay=0.0))
    params = _params(tree)
    state = tx.init(params)
    for step in range(2):
        updates, state = tx.update(_grads(tree, step), state, params)
        assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates))


ODD = (
    {"kernel": Leaf((2, 3), "float32", "bfloat16", "moderate", 0), "bias": None, "norm": ()},
    [Leaf((), "bfloat16", "float32", "moderate", 1), Leaf((0, 3), "float16", "float16", "zero", 2)],
    (Leaf((2, 1, 3), "float32", "float32", "tiny", 3), {"0": Leaf((3,), *DTYPES[:2], "zero", 4)}),
)


@pytest.mark.diagonal
@every
@pytest.mark.parametrize("tree", ODD, ids=["kernel", "scalar", "nested"])
def test_compiled_equals_eager(make: Make, tree: Any) -> None:
    tx = make(0.1, **_options(make, sync_period=2))
    params = _params(tree)
    update = jax.jit(tx.update)
    eager = compiled = tx.init(params)
    for step in range(2):
        expected, eager = tx.update(_grads(tree, step), eager, params)
        actual, compiled = update(_grads(tree, step), compiled, params)
        assert _types((actual, compiled)) == _types((expected, eager))
        for x, y in zip(
            jax.tree.leaves((actual, compiled)), jax.tree.leaves((expected, eager)), strict=True
        ):
            # A few float32 roundings, because compiled code fuses products and sums, or one
            # rounding of the dtype itself where that is coarser.
            rtol = max(1e-5, float(jnp.finfo(x.dtype).eps)) if x.dtype != "int32" else 0
            np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=rtol, atol=1e-6)
