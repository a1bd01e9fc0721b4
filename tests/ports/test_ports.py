"""What all ports promise; that they follow their sources is tested in test_recorded.py."""

import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import ports, recorded
from optim_zoo.recorded.agreement import make

LIBRARIES = [name for name in ports.__all__ if not name.startswith("from_")]
PORTS = [
    pytest.param(value, id=f"{library}.{name}")
    for library in LIBRARIES
    for name, value in vars(importlib.import_module(f"optim_zoo.ports.{library}")).items()
    if inspect.isfunction(value)
    and value.__module__ == f"optim_zoo.ports.{library}"
    and (name[0].isupper() or name == "create_optimizer")
]
# One case a constructor: with its arguments a port is made as its users make it.
ONE_EACH = list({c.constructor: c for c in recorded.cases() if ".ports." in c.constructor}.values())
one_each = pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.constructor[16:])


def test_every_recorded_constructor_is_a_port() -> None:
    made = {f"optim_zoo.ports.{p.id}" for p in PORTS}
    assert {case.constructor for case in ONE_EACH} == made


@pytest.mark.parametrize("port", PORTS)
def test_says_how_closely_it_agrees(port: Any) -> None:
    assert port.__doc__
    module = importlib.import_module(port.__module__)
    assert "grees with" in f"{module.__doc__} {port.__doc__}"


DEFECTS = {
    "lifeiteng.LookaheadOptimizer": "The first synchronization shrinks the weights to ``alpha``",
    "michaelrzhang.LookaheadTF": "The first synchronization shrinks the weights to ``la_alpha``",
    "jyhengcoder.Ranger": "Its first step shrinks the weights to ``alpha`` times their value",
    "pytorch_optimizer.Ranger": "Its first five steps go uphill",
    "pytorch_optimizer.RAdam": "In its first five steps nothing moves",
    "pytorch_optimizer.Lamb": "Only the first moment is corrected",
    "timm.Lookahead": "The first synchronization does nothing",
    "bert.create_optimizer": "The learning rate drops at the end of the warmup",
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_said_first_with_the_repaired_spelling(name: str) -> None:
    library, port = name.split(".")
    doc = inspect.getdoc(getattr(getattr(ports, library), port))
    assert doc is not None
    assert doc.startswith(DEFECTS[name])
    assert "Repaired:" in doc


def _tree(dtype: str, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {
        "dense": {"kernel": jnp.asarray(rng.normal(size=(3, 2)), dtype),
                  "bias": jnp.asarray(rng.normal(size=2), dtype)},
        "layer_norm": {"scale": jnp.asarray(rng.normal(size=2), dtype)},
    }  # fmt: skip


def _types(tree: Any) -> Any:
    return jax.tree.structure(tree), [
        (x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)
    ]


@one_each
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32")], ids="-".join)
def test_updates_are_like_the_parameters_and_state_keeps_its_types(
    case: recorded.Case, dtypes: tuple[str, str]
) -> None:
    tx = make(case.constructor, case.arguments, case.inner, case.load())
    params, grads = _tree(dtypes[0], 0), _tree(dtypes[1], 1)
    state = tx.init(params)
    expected = _types(state)
    step = jax.jit(tx.update, donate_argnums=1)
    for _ in range(3):
        updates, state = step(grads, state, params)
        assert _types(state) == expected
        for u, x in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert (u.shape, u.dtype) == (x.shape, x.dtype)
            assert np.isfinite(u).all()
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=case.constructor[16:])
        for case in ONE_EACH
        for name in ("lr", "learning_rate")
        if isinstance(case.arguments.get(name), float)
    ],
)
def test_a_constant_schedule_is_its_value(case: recorded.Case, name: str) -> None:
    rate = case.arguments[name]
    params, grads = _tree("float32", 0), _tree("float32", 1)
    results = []
    for given in (rate, lambda step: rate):
        tx = make(case.constructor, {**case.arguments, name: given}, case.inner, case.load())
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
        results.append(updates)
    # One rounding where a factor is the product of two numbers, known or traced.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-7), *results)
