"""Tests that a run with optax resumes with the optimizer of the same name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim_zoo
from optim_zoo import ports, schedules, tree

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PAIRS: dict[str, tuple[Any, Any]] = {
    "sgd": (optax.sgd, optim_zoo.sgd),
    "sgd-momentum": (lambda r: optax.sgd(r, 0.9), lambda r: optim_zoo.sgd(r, 0.9)),
    "momentum": (lambda r: optax.sgd(r, 0.9), optim_zoo.momentum),
    "nesterov": (lambda r: optax.sgd(r, 0.9, nesterov=True), optim_zoo.nesterov),
    "adagrad": (optax.adagrad, optim_zoo.adagrad),
    "adadelta": (optax.adadelta, optim_zoo.adadelta),
    "rmsprop": (optax.rmsprop, optim_zoo.rmsprop),
    "rmsprop-centered": (
        lambda r: optax.rmsprop(r, centered=True, momentum=0.9),
        lambda r: optim_zoo.rmsprop(r, centered=True, momentum=0.9),
    ),
    "adam": (optax.adam, optim_zoo.adam),
    "lazy_adam": (optax.adam, optim_zoo.lazy_adam),
    "adamw": (optax.adamw, optim_zoo.adamw),
    "nadam": (optax.nadam, optim_zoo.nadam),
    "radam": (optax.radam, optim_zoo.radam),
    "lamb": (optax.lamb, optim_zoo.lamb),
    "lars": (optax.lars, optim_zoo.lars),
    "torch.AdamW": (
        lambda r: optax.adamw(r, weight_decay=0.01),
        lambda r: ports.torch.AdamW(r, weight_decay=0.01),
    ),
    "injected": (optax.inject_hyperparams(optax.adamw), optax.inject_hyperparams(optim_zoo.adamw)),
    "scheduled": (
        lambda r: optax.adamw(schedules.warmup_cosine(r, 2, 9)),
        lambda r: optim_zoo.adamw(schedules.warmup_cosine(r, 2, 9)),
    ),
}


def _tree(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {"kernel": jnp.asarray(rng.normal(size=(3, 2)), "float32"),
            "bias": jnp.asarray(rng.normal(size=2), "float32")}  # fmt: skip


def _after(tx: optax.GradientTransformation, steps: int) -> Any:
    """Returns the state after some steps with fixed parameters."""
    state = tx.init(_tree(0))
    for i in range(steps):
        _, state = tx.update(_tree(i + 1), state, _tree(0))
    return state


@pytest.mark.parametrize("name", PAIRS)
def test_the_next_step_agrees_with_optax(name: str) -> None:
    theirs, ours = (make(0.1) for make in PAIRS[name])
    with jax.disable_jit():
        state = _after(theirs, 3)
        carried = ports.from_optax_state(ours, state, _tree(0))
        fresh = ours.init(_tree(0))
        assert jax.tree.structure(carried) == jax.tree.structure(fresh)
        assert jax.tree.map(jnp.shape, carried) == jax.tree.map(jnp.shape, fresh)
        expected, _ = theirs.update(_tree(9), state, _tree(0))
        updates, _ = ours.update(_tree(9), carried, _tree(0))
    if name == "lars":  # our trust ratio differs; the momentum is the same
        momentum = optax.tree.get(carried, "momentum")
        jax.tree.map(np.testing.assert_array_equal, momentum, optax.tree.get(state, "trace"))
        return
    # optax computes 1 - 0.999^4 = 4e-3 in float32, with a relative error of 6e-8 / 4e-3.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 2e-5, 1e-7), updates, expected)


@pytest.mark.parametrize("name", ["sgd-momentum", "rmsprop-centered", "adamw", "lamb"])
def test_an_optimizer_may_be_passed_by_name(name: str) -> None:
    theirs, ours = (make(0.1) for make in PAIRS[name])
    state = _after(theirs, 2)
    by_name = ports.from_optax_state(name.split("-")[0], state, _tree(0))
    expected = ports.from_optax_state(ours, state, _tree(0))
    assert jax.tree.structure(by_name) == jax.tree.structure(expected)
    moments = [(x, y) for x, y in zip(*map(jax.tree.leaves, (by_name, expected)), strict=True)
               if x.ndim]  # fmt: skip
    assert moments
    for x, y in moments:
        np.testing.assert_array_equal(x, y)


def test_the_state_of_lookahead_is_converted() -> None:
    theirs = optax.lookahead(optax.sgd(0.1, 0.9), 3, 0.5)
    ours = optim_zoo.lookahead(optim_zoo.sgd(0.1, 0.9), 3, 0.5)
    params = optax.LookaheadParams.init_synced(_tree(0))
    state = theirs.init(params)
    for i in range(4):
        updates, state = theirs.update(_tree(i + 1), state, params)
        params = optax.apply_updates(params, updates)
    fast, carried = params.fast, ports.from_optax_state(ours, state, params)
    for i in range(4, 7):  # includes a synchronization
        updates, state = theirs.update(_tree(i + 1), state, params)
        params = optax.apply_updates(params, updates)
        updates, carried = ours.update(_tree(i + 1), carried, fast)
        fast = optax.apply_updates(fast, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 2e-6, 1e-6), fast, params.fast)


def test_the_state_is_copied() -> None:
    """A donated step must not delete the arrays of the state that was carried over."""
    state = _after(optax.adam(0.1), 1)
    carried = ports.from_optax_state(optim_zoo.adam(0.1), state, _tree(0))
    theirs = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
    assert not theirs & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(carried)}


def test_bfloat16_moments_become_float32() -> None:
    state = _after(optax.adam(0.1, mu_dtype="bfloat16"), 1)
    carried = ports.from_optax_state("adam", state, _tree(0))
    assert {x.dtype.name for x in jax.tree.leaves(optax.tree.get(carried, "mu"))} == {"float32"}


def test_a_step_can_be_passed() -> None:
    state = _after(optax.sgd(0.1, 0.9), 3)
    ours = optim_zoo.sgd(lambda step: 0.1 * step, 0.9)
    carried = ports.from_optax_state(ours, state, _tree(0), step=3)
    assert optax.tree.get(carried, "TraceMomentumState").count == 3
    expected = jax.tree.map(lambda m, g: -0.3 * (0.9 * m + g), state[0].trace, _tree(5))
    updates, _ = ours.update(_tree(5), carried, _tree(0))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-6), updates, expected)


@pytest.mark.parametrize(
    ("source", "state", "kind", "message"),
    [
        ("adamww", optax.adam(0.1), ValueError, "unknown optimizer 'adamww'; did you mean adamw"),
        ("adam", optax.sgd(0.1, 0.9), ValueError, "must hold the arrays of ScaleByAdamState"),
        (optim_zoo.sgd(0.1), optax.adam(0.1), ValueError, "hold nothing that the optimizer does"),
        ("amsgrad", optax.amsgrad(0.1), NotImplementedError, "not know ScaleByAmsgradState"),
        (ports.timm.LaProp(), optax.adam(0.1), NotImplementedError, "LaPropState keeps state"),
        ("lookahead", optax.adam(0.1), TypeError, "must be an optimizer that wraps no other"),
        (optim_zoo.lookahead(optim_zoo.adam(0.1)), optax.adam(0.1), ValueError, "optax.lookahead"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    source: Any, state: optax.GradientTransformation, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        ports.from_optax_state(source, state.init(_tree(0)), _tree(0))


def test_a_state_of_other_parameters_is_refused() -> None:
    state = optax.adam(0.1).init(_tree(0))
    other = {**_tree(0), "scale": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"mu of state must have .* they differ at \['scale'\]"):
        ports.from_optax_state("adam", state, other)


def test_parameters_with_other_paths_are_refused() -> None:
    state = _after(optax.adam(0.1), 1)
    boxed = tuple(_tree(0).values())
    with pytest.raises(ValueError, match="they differ at"):
        ports.from_optax_state("adam", state, boxed)
    assert tree.leaf_paths(state[0].mu) == tree.leaf_paths(_tree(0))
