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


# What recorded cases do not reach; the numbers were worked out from the sources' formulas.


@pytest.mark.parametrize(("rate", "scheduled"), [(2.0, False), (2.0, True), (0.25, True)])
def test_larc_bounds_the_ratio_of_a_zero_layer_too(rate: float, scheduled: bool) -> None:
    """timm holds min(ratio / lr, 1), its ratio is 1 where a norm is 0: the step is min(lr, 1)."""
    lr = (lambda step: rate) if scheduled else rate
    tx = ports.timm.Lars(lr, weight_decay=0.1, trust_clip=True)
    params, grads = {"zero": jnp.zeros(2)}, {"zero": jnp.ones(2)}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["zero"], -min(rate, 1.0))


def test_larc_under_a_warmup_from_zero() -> None:
    """Where the rate is 0 nothing moves, and the next step is that of its rate."""
    params, grads = _tree("float32", 0), _tree("float32", 1)
    results = []
    for lr in (lambda step: 0.1 * step, 0.1):
        tx = ports.timm.Lars(lr, weight_decay=0.1, trust_clip=True, trust_coeff=0.01)
        state = tx.init(params)
        if callable(lr):
            updates, state = tx.update(grads, state, params)
            assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates))
        updates, _ = tx.update(grads, state, params)
        results.append(updates)
    # The rate is a product in one and a number in the other: one rounding of float32.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-7), *results)


@pytest.mark.parametrize(
    ("port", "arguments"),
    [
        (ports.torch.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
        (ports.timm.Lars, {"lr": 0.1, "weight_decay": 0.1, "trust_clip": True}),
        (ports.timm.Lamb, {"lr": 0.1, "weight_decay": 0.1, "decoupled_decay": True}),
        (ports.pytorch_optimizer.LARS, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        (ports.keras.SGD, {"learning_rate": 0.1, "momentum": 0.9}),
        (ports.keras.Lamb, {"learning_rate": 0.1, "weight_decay": 0.1}),
    ],
    ids=["AdamW", "timm.Lars", "timm.Lamb", "po.LARS", "keras.SGD", "keras.Lamb"],
)
def test_injected_hyperparameters(port: Any, arguments: dict[str, Any]) -> None:
    """Compiled, so that every number is traced."""
    params, grads = _tree("float32", 0), _tree("float32", 1)
    injected = optax.inject_hyperparams(port)(**arguments)
    plain = port(**arguments)
    updates, _ = jax.jit(injected.update)(grads, injected.init(params), params)
    expected, _ = plain.update(grads, plain.init(params), params)
    # A rate near 1 as a float32 array: 1 - 0.999 is off by 3e-5, half of it after a root.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-5), updates, expected)


@pytest.mark.parametrize("port", [p for p in PORTS if p.id.startswith("keras.")])
def test_keras_takes_the_arguments_of_its_base_class(port: Any) -> None:
    """By position too, and in its order."""
    names = list(inspect.signature(port).parameters)
    own = names.index("clipnorm")
    assert names[own:] == [
        "clipnorm", "clipvalue", "global_clipnorm", "use_ema", "ema_momentum",
        "ema_overwrite_frequency", "loss_scale_factor", "gradient_accumulation_steps", "name",
        "exclude_from_weight_decay",
    ]  # fmt: skip
    defaults = [p.default for p in inspect.signature(port).parameters.values()]
    params, grads = _tree("float32", 0), _tree("float32", 1)
    by_place = port(*defaults[:own], 0.5)
    by_name = port(clipnorm=0.5)
    results = [tx.update(grads, tx.init(params), params)[0] for tx in (by_place, by_name)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    with pytest.raises(ValueError, match="only one of clipnorm, clipvalue, global_clipnorm can be"):
        port(clipnorm=0.5, clipvalue=0.5)


def test_timm_refuses_what_would_stop_it() -> None:
    """A bound of 0, by which timm divides, and makes all gradients 0."""
    with pytest.raises(ValueError, match=r"max_grad_norm must be in \(0, inf\], got 0"):
        ports.timm.Lamb(max_grad_norm=0.0)
