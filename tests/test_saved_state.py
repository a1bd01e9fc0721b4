"""Descriptions of states: what they hold, what they tell apart, and what makes no difference."""

import json
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import optim_zoo
from optim_zoo import saved_state
from optim_zoo.tree import Tree
from optim_zoo.wrappers.accumulation import accumulate
from optim_zoo.wrappers.precision import master_weights, stochastic_rounding

PARAMS = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}


def described(tx: optax.GradientTransformation, params: Tree = PARAMS) -> dict[str, Any]:
    """What a file gives back."""
    return json.loads(json.dumps(saved_state.describe(tx.init(params))))


def test_a_description_names_every_array() -> None:
    assert described(optim_zoo.adam(0.1)) == {
        "version": 1,
        "arrays": {
            "0/count": "int32()",
            "0/mu/dense/bias": "float32(4,)",
            "0/mu/dense/kernel": "float32(3, 4)",
            "0/nu/dense/bias": "float32(4,)",
            "0/nu/dense/kernel": "float32(3, 4)",
            "1/count": "int32()",
            "1/learning_rate": "float32()",
        },
    }


def test_keys_low_precision_and_numbers() -> None:
    state = {
        "key": jax.random.key(0),
        "keys": jax.random.split(jax.random.key(0, impl="rbg"), 2),
        "low": jnp.zeros((2, 0), jnp.bfloat16),
        "host": np.zeros(3, np.int8),
        "number": 0.5,
    }
    assert saved_state.describe(state)["arrays"] == {
        "host": "int8(3,)",
        "key": "key<fry>()",
        "keys": "key<rbg>(2,)",
        "low": "bfloat16(2, 0)",
        "number": "float32()",
    }


@pytest.mark.parametrize(
    "tx",
    [
        optim_zoo.lamb(0.1),
        stochastic_rounding(optim_zoo.adam(0.1), jax.random.key(0)),
        master_weights(optim_zoo.sgd(0.1)),
        optax.identity(),
    ],
    ids=["lamb", "stochastic_rounding", "master_weights", "identity"],
)
def test_shapes_alone_and_tracers_are_described_as_arrays_are(tx: Any) -> None:
    params = {**PARAMS, "low": jnp.ones(5, jnp.bfloat16)}
    expected = saved_state.describe(tx.init(params))
    assert saved_state.describe(jax.eval_shape(tx.init, params)) == expected
    seen = []
    jax.jit(lambda state: seen.append(saved_state.describe(state)))(tx.init(params))
    assert seen == [expected]


def test_a_state_without_arrays() -> None:
    description = described(optax.identity())
    assert description == {"version": 1, "arrays": {}}
    saved_state.check(description, optax.identity().init(PARAMS))
    with pytest.raises(ValueError, match="1/learning_rate is missing in the checkpoint"):
        saved_state.check(description, optim_zoo.momentum(0.1).init(PARAMS))


def test_flax_containers() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.dense = nnx.Linear(4, 6, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optim_zoo.adam(0.1), wrt=nnx.Param)
    arrays = saved_state.describe(nnx.state((model, optimizer)))["arrays"]
    assert arrays["0/dense/kernel/value"] == "float32(4, 6)"
    assert arrays["0/dropout/rngs/key/value"] == "key<fry>()"
    assert arrays["1/opt_state/0/mu/dense/kernel/value"] == "float32(4, 6)"
    frozen = optim_zoo.adam(0.1).init(freeze(PARAMS))
    assert saved_state.differences(described(optim_zoo.adam(0.1)), frozen) == []


class Pair(NamedTuple):
    value: Any
    other: Any


def test_no_two_arrays_share_a_path() -> None:
    state = (
        {"a/b": 1.0, "a": {"b": 2, "value": Pair(3.0, 4)}, '"a/b"': jnp.zeros(1)},
        [Pair((5.0,), {"0": 6})],
    )
    arrays = saved_state.describe(state)["arrays"]
    assert len(arrays) == len(jax.tree.leaves(state))
    assert arrays['0/"a/b"'] == "float32()"
    assert arrays["0/a/b"] == "int32()"
    assert arrays["0/a/value/value"] == "float32()"


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        (optim_zoo.adamw(0.1), optim_zoo.adamw(lambda step: 0.1 / (step + 1))),
        (optim_zoo.lamb(optim_zoo.schedules.constant(0.1)), optim_zoo.lamb(0.2, 0.8, 0.9, 1e-3)),
        (optim_zoo.clip_by_global_norm(1.0), optim_zoo.clip_by_global_norm(math.inf)),
        (accumulate(optim_zoo.sgd(0.1), 2), accumulate(optim_zoo.sgd(0.1), lambda step: 4)),
    ],
    ids=["rate", "hyperparameters", "clipping", "accumulation"],
)
def test_numbers_make_no_difference(saved: Any, now: Any) -> None:
    for one, other in ((saved, now), (now, saved)):
        assert saved_state.differences(described(one), other.init(PARAMS)) == []
        saved_state.check(described(one), other.init(PARAMS))


ADAMW = optim_zoo.adamw(0.1)
# Saved by the first and compared with the second: some of the lines, and how many there are.
PAIRS = {
    "adam, amsgrad": (
        optim_zoo.adam(0.1),
        optim_zoo.amsgrad(0.1),
        [
            "0/nu_max/dense/bias is missing in the checkpoint",
            "0/nu_max/dense/kernel is missing in the checkpoint",
        ],
        2,
    ),
    "sgd, momentum": (
        optim_zoo.sgd(0.1),
        optim_zoo.momentum(0.1),
        [
            "0/learning_rate is only in the checkpoint",
            "0/momentum/dense/bias is missing in the checkpoint",
            "0/momentum/dense/kernel is missing in the checkpoint",
            "1/count is missing in the checkpoint",
            "1/learning_rate is missing in the checkpoint",
        ],
        5,
    ),
    "adamw, lamb": (
        ADAMW,
        optim_zoo.lamb(0.1),
        [
            "2/count is only in the checkpoint",
            '2/trust_ratio/"dense/kernel" is missing in the checkpoint',
        ],
        10,  # three figures of two leaves, and the rate's place
    ),
    "clipping": (
        ADAMW,
        optax.chain(optim_zoo.clip_by_global_norm(1.0), ADAMW),
        [
            "0/gradient_norm is missing in the checkpoint",
            "0/mu/dense/kernel is only in the checkpoint",
            "1/0/mu/dense/kernel is missing in the checkpoint",
        ],
        2 + 2 * 7,  # its norms, and the seven arrays of AdamW in another place
    ),
    "accumulation": (
        ADAMW,
        accumulate(ADAMW, 2),
        [
            "2/count is only in the checkpoint",
            "inner/2/count is missing in the checkpoint",
            "sums/dense/kernel is missing in the checkpoint",
        ],
        7 + len(jax.tree.leaves(accumulate(ADAMW, 2).init(PARAMS))),  # all of both
    ),
    "master weights": (
        ADAMW,
        master_weights(ADAMW),
        [
            "2/count is only in the checkpoint",
            "inner/2/count is missing in the checkpoint",
        ],
        2 * 7,  # float32 parameters have no master
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_another_optimizer_is_told_by_its_paths(name: str) -> None:
    one, other, some, count = PAIRS[name]
    lines = saved_state.differences(described(one), other.init(PARAMS))
    assert set(some) <= set(lines)
    assert len(lines) == len(set(lines)) == count
    swap = {"only in": "missing in", "missing in": "only in"}
    assert saved_state.differences(described(other), one.init(PARAMS)) == [
        re.sub("only in|missing in", lambda found: swap[found[0]], line) for line in lines
    ]
    for saved, now in ((one, other), (other, one)):
        with pytest.raises(ValueError, match=r"take the optimizer and options it was saved with$"):
            saved_state.check(described(saved), now.init(PARAMS))


def test_other_shapes_and_dtypes() -> None:
    saved = described(optim_zoo.adam(0.1))
    wider = {"dense": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(4)}}
    state = optim_zoo.adam(0.1).init(wider)
    assert saved_state.differences(saved, state) == [
        "0/mu/dense/kernel was float32(3, 4) and is float32(3, 5)",
        "0/nu/dense/kernel was float32(3, 4) and is float32(3, 5)",
    ]
    moments, rate = optim_zoo.adam(0.1).init(PARAMS)
    state = (moments._replace(nu=optax.tree.cast(moments.nu, jnp.bfloat16)), rate)
    assert saved_state.differences(saved, state) == [
        "0/nu/dense/bias was float32(4,) and is bfloat16(4,)",
        "0/nu/dense/kernel was float32(3, 4) and is bfloat16(3, 4)",
    ]
    with pytest.raises(ValueError, match=r"take the shapes, dtypes and options it was saved with$"):
        saved_state.check(saved, state)


def test_a_state_that_is_one_array() -> None:
    lines = saved_state.differences(saved_state.describe(jnp.ones(3)), jnp.ones(4))
    assert lines == ["the only array was float32(3,) and is float32(4,)"]


def test_an_error_lists_the_first_few_paths_and_counts_the_others() -> None:
    saved = saved_state.describe([jnp.ones(1) for _ in range(5)])
    with pytest.raises(ValueError, match="fit") as caught:
        saved_state.check(saved, [jnp.ones(2) for _ in range(5)])
    changed = [f"{i} was float32(1,) and is float32(2,)" for i in range(5)]
    assert str(caught.value) == (
        f"the saved state does not fit this optimizer and its parameters ({'; '.join(changed)}): "
        f"take the shapes, dtypes and options it was saved with"
    )
    with pytest.raises(ValueError, match=r"\(2,\); and 2 more\): take the optimizer"):
        saved_state.check(saved, [jnp.ones(2) for _ in range(7)])


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = described(ADAMW)
    monkeypatch.setattr(saved_state, "VERSION", 2)
    state = ADAMW.init(PARAMS)
    assert saved_state.differences(saved, state) == [
        "the layout of states was version 1 and is version 2"
    ]
    with pytest.raises(ValueError, match="restore it with the version of optim_zoo it was saved"):
        saved_state.check(saved, state)


@pytest.mark.parametrize(
    "saved",
    [
        None,
        [],
        "text",
        {},
        {"version": 1},
        {"version": "1", "arrays": {}},
        {"version": 1, "arrays": ["0/count"]},
        {"version": 1, "arrays": {"0/count": 3}},
        {"version": 1, "arrays": {0: "int32()"}},
    ],
)
def test_what_is_no_description_is_one_sentence(saved: Any) -> None:
    for function in (saved_state.differences, saved_state.check):
        with pytest.raises(
            ValueError, match="expected a description made by saved_state"
        ) as caught:
            function(saved, ADAMW.init(PARAMS))
        assert "\n" not in str(caught.value)


def test_what_is_no_array_is_named() -> None:
    with pytest.raises(TypeError, match="made of arrays, got str at 0/name"):
        saved_state.describe([{"name": "adam"}])
