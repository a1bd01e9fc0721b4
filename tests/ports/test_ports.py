"""Tests the contract of all ports. test_recorded.py compares them with their sources."""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import ports, recorded, tree
from optim_zoo.recorded.agreement import make

pytestmark = pytest.mark.usefixtures("quick_to_compile")

LIBRARIES = [name for name in ports.__all__ if not name.startswith("from_")]
PORTS = [
    pytest.param(value, id=f"{library}.{name}")
    for library in LIBRARIES
    for name, value in vars(importlib.import_module(f"optim_zoo.ports.{library}")).items()
    if inspect.isfunction(value)
    and value.__module__ == f"optim_zoo.ports.{library}"
    and (name[0].isupper() or name == "create_optimizer")
]
# One case for each constructor, with the arguments that users pass.
ONE_EACH = list({c.constructor: c for c in recorded.cases() if ".ports." in c.constructor}.values())
one_each = pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.constructor[16:])


def test_every_recorded_constructor_is_a_port() -> None:
    made = {f"optim_zoo.ports.{p.id}" for p in PORTS}
    assert {case.constructor for case in ONE_EACH} == made


@pytest.mark.parametrize("port", PORTS)
def test_the_docstring_says_how_closely_it_agrees(port: Any) -> None:
    assert port.__doc__
    module = importlib.import_module(port.__module__)
    assert "grees with" in f"{module.__doc__} {port.__doc__}"


DEFECTS = {
    "lifeiteng.LookaheadOptimizer": "at first shrinks the weights to ``alpha`` times",
    "michaelrzhang.LookaheadTF": "at first shrinks the weights to ``la_alpha`` times",
    "jyhengcoder.Ranger": "whose first step shrinks the weights to ``alpha`` times their value",
    "pytorch_optimizer.Ranger": "takes its first five steps uphill",
    "pytorch_optimizer.RAdam": "neither moves nor decays in its first five steps",
    "pytorch_optimizer.Lamb": "corrects only the first moment for its bias",
    "timm.Lookahead": "whose first synchronization does nothing",
    "bert.create_optimizer": "whose learning rate drops at the end of the warmup",
}


@pytest.mark.parametrize("name", DEFECTS)
def test_the_summary_names_a_defect_and_the_docstring_its_repair(name: str) -> None:
    library, port = name.split(".")
    doc = inspect.getdoc(getattr(getattr(ports, library), port))
    assert doc is not None
    assert DEFECTS[name] in doc.splitlines()[0]
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
def test_updates_match_the_parameters_and_state_keeps_its_types(
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
def test_a_constant_schedule_equals_its_value(case: recorded.Case, name: str) -> None:
    rate = case.arguments[name]
    params, grads = _tree("float32", 0), _tree("float32", 1)
    results = []
    for given in (rate, lambda step: rate):
        tx = make(case.constructor, {**case.arguments, name: given}, case.inner, case.load())
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
        results.append(updates)
    # A product of two numbers is rounded once when one of them is traced.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-7), *results)


# Behaviour that no recorded case covers. The numbers follow from the formulas of the sources.


@pytest.mark.parametrize(("rate", "scheduled"), [(2.0, False), (2.0, True), (0.25, True)])
def test_larc_clips_the_ratio_of_a_zero_layer(rate: float, scheduled: bool) -> None:
    """timm clips ratio / lr to 1, and the ratio is 1 if a norm is 0: the step is min(lr, 1)."""
    lr = (lambda step: rate) if scheduled else rate
    tx = ports.timm.Lars(lr, weight_decay=0.1, trust_clip=True)
    params, grads = {"zero": jnp.zeros(2)}, {"zero": jnp.ones(2)}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["zero"], -min(rate, 1.0))


def test_larc_accepts_a_warmup_from_zero() -> None:
    """A step with learning rate 0 changes nothing; the next step uses its own learning rate."""
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
    # One learning rate is a product and the other a number: one float32 rounding.
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
def test_injected_hyperparameters_give_the_same_steps(port: Any, arguments: dict[str, Any]) -> None:
    """Compares with a plain optimizer; the compiled update traces every hyperparameter."""
    params, grads = _tree("float32", 0), _tree("float32", 1)
    injected = optax.inject_hyperparams(port)(**arguments)
    plain = port(**arguments)
    updates, _ = jax.jit(injected.update)(grads, injected.init(params), params)
    expected, _ = plain.update(grads, plain.init(params), params)
    # 1 - 0.999 from a float32 array is off by 3e-5, and by half of that after a square root.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-5), updates, expected)


@pytest.mark.parametrize("port", [p for p in PORTS if p.id.startswith("keras.")])
def test_keras_ports_accept_the_arguments_of_the_base_class(port: Any) -> None:
    """Their order is that of Keras, so that they can also be passed by position."""
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


# The ports whose source accepts a momentum of 1, and the largest momentum it accepts.
MOMENTA: dict[str, tuple[Callable[..., Any], float]] = {
    "torch.SGD": (lambda m: ports.torch.SGD(0.1, m), np.inf),
    "torch.SGD-nesterov": (lambda m: ports.torch.SGD(0.1, m, nesterov=True), np.inf),
    "torch.RMSprop": (lambda m: ports.torch.RMSprop(0.1, momentum=m), np.inf),
    "timm.Lars": (lambda m: ports.timm.Lars(0.1, m), np.inf),
    "timm.RMSpropTF": (lambda m: ports.timm.RMSpropTF(0.1, momentum=m), np.inf),
    "keras.SGD": (lambda m: ports.keras.SGD(0.1, m), 1.0),
    "keras.RMSprop": (lambda m: ports.keras.RMSprop(0.1, momentum=m), np.inf),
    "tensorflow_addons.SGDW": (lambda m: ports.tensorflow_addons.SGDW(0.0, 0.1, m), 1.0),
    "tf1.MomentumOptimizer": (lambda m: ports.tf1.MomentumOptimizer(0.1, m), np.inf),
    "tf1.RMSPropOptimizer": (lambda m: ports.tf1.RMSPropOptimizer(0.1, momentum=m), np.inf),
    "mlperf.LARSOptimizer": (lambda m: ports.mlperf.LARSOptimizer(0.1, m), np.inf),
}


@pytest.mark.parametrize(("port", "highest"), MOMENTA.values(), ids=MOMENTA)
def test_momentum_is_accepted_up_to_the_limit_of_the_source(
    port: Callable[..., Any], highest: float
) -> None:
    """The steps with a momentum of 1 are the limit of those with a momentum just below 1."""
    params, grads = _tree("float32", 0), _tree("float32", 1)
    results = []
    with jax.disable_jit():
        for momentum in (1.0, 1 - 1e-6):
            tx = port(momentum)
            state = tx.init(params)
            for _ in range(2):
                updates, state = tx.update(grads, state, params)
            results.append(updates)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), *results)
    if highest == 1:
        with pytest.raises(ValueError, match=r"^momentum must be in \[0, 1\], got 1.5"):
            port(1.5)
    else:
        port(1.5)
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^momentum must be in "):
            port(wrong)
    with pytest.raises(TypeError, match="momentum must be float32 or wider, got bfloat16"):
        port(jnp.asarray(0.9, "bfloat16"))


@pytest.mark.parametrize("momentum", [1.0, 1.5])
def test_pytorch_optimizer_refuses_a_momentum_of_1(momentum: float) -> None:
    """The source refuses it too."""
    with pytest.raises(ValueError, match=r"^momentum must be in \[0, 1\), got"):
        ports.pytorch_optimizer.LARS(momentum=momentum)


def test_torch_accepts_any_dampening() -> None:
    """It may have any size. With 1, later gradients do not enter the momentum."""
    params, grads = _tree("float32", 0), _tree("float32", 1)
    for dampening, second in ((1.0, 0.5), (1.5, 0.0), (-1.0, 2.5)):
        tx = ports.torch.SGD(1.0, 0.5, dampening)
        _, state = tx.update(grads, tx.init(params), params)
        updates, _ = tx.update(grads, state, params)
        jax.tree.map(
            lambda u, g, s=second: np.testing.assert_allclose(u, -s * g, 1e-6), updates, grads
        )


def test_the_weight_decay_of_rectified_adam_may_be_a_schedule() -> None:
    """TensorFlow Addons calls it with the number of previous steps, 0 at the first step."""
    decays = (0.0, 0.5, 0.25)
    params, grads = _tree("float32", 0), _tree("float32", 1)
    make = functools.partial(
        ports.tensorflow_addons.RectifiedAdam, 0.1, exclude_from_weight_decay=["scale"]
    )
    scheduled = make(weight_decay=lambda step: jnp.asarray(decays)[step])
    with jax.disable_jit():
        state = scheduled.init(params)
        plain = make().init(params)
        for decay in decays:
            updates, state = scheduled.update(grads, state, params)
            expected, plain = make().update(grads, plain, params)
            for path, u in tree.by_path(updates).items():
                decayed = 0 if "scale" in path else 0.1 * decay * tree.by_path(params)[path]
                without = tree.by_path(expected)[path]
                # One float32 rounding of the sum; atol, because the sum may be small.
                np.testing.assert_allclose(u, without - decayed, 2e-6, 1e-7, err_msg=path)
    assert _types(state) == _types(scheduled.init(params))
    wrong = make.func(0.1, weight_decay=lambda step: 0.1, exclude_from_weight_decay=["sacle"])
    with pytest.raises(ValueError, match="exclude_from_weight_decay: 'sacle' matches no leaf"):
        wrong.init(params)


def test_timm_refuses_a_limit_of_0() -> None:
    """In timm a limit of 0 makes all gradients 0."""
    with pytest.raises(ValueError, match=r"max_grad_norm must be in \(0, inf\], got 0"):
        ports.timm.Lamb(max_grad_norm=0.0)
