"""Tests what the description of a state records, and which states it distinguishes."""

import itertools
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.core import freeze
from flax.training.train_state import TrainState

import optim_zoo
from optim_zoo import saved_state
from optim_zoo.tree import Tree
from optim_zoo.wrappers.accumulation import accumulate
from optim_zoo.wrappers.guards import skip_nonfinite, skip_spikes
from optim_zoo.wrappers.metrics import with_metrics
from optim_zoo.wrappers.precision import master_weights, stochastic_rounding, store_state

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PARAMS = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}


def described(tx: optax.GradientTransformation, params: Tree = PARAMS) -> dict[str, Any]:
    """Returns the description of the initial state, as read back from a JSON file."""
    return json.loads(json.dumps(saved_state.describe(tx.init(params))))


def test_a_description_names_every_array_and_container() -> None:
    assert described(optim_zoo.adam(0.1)) == {
        "version": 3,
        "arrays": {
            "0/count": "int32()",
            "0/mu/dense/bias": "float32(4,)",
            "0/mu/dense/kernel": "float32(3, 4)",
            "0/nu/dense/bias": "float32(4,)",
            "0/nu/dense/kernel": "float32(3, 4)",
            "1/rate": "float32()",
            "1/step": "int32()",
        },
        "containers": {
            "": "tuple",
            "0": "ScaleByAdamState",
            "0/mu": "dict",
            "0/mu/dense": "dict",
            "0/nu": "dict",
            "0/nu/dense": "dict",
            "1": "ScaleByLearningRateState",
        },
    }


def test_keys_low_precision_and_python_numbers_are_described() -> None:
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
def test_shapes_and_tracers_are_described_like_arrays(tx: Any) -> None:
    params = {**PARAMS, "low": jnp.ones(5, jnp.bfloat16)}
    expected = saved_state.describe(tx.init(params))
    assert saved_state.describe(jax.eval_shape(tx.init, params)) == expected
    seen = []
    jax.jit(lambda state: seen.append(saved_state.describe(state)))(tx.init(params))
    assert seen == [expected]


def test_a_state_without_arrays_is_described() -> None:
    description = described(optax.identity())
    assert description == {"version": 3, "arrays": {}, "containers": {"": "EmptyState"}}
    saved_state.check(description, optax.identity().init(PARAMS))
    with pytest.raises(ValueError, match="0/rate is missing in the checkpoint"):
        saved_state.check(description, optim_zoo.sgd(0.1).init(PARAMS))


def test_flax_containers_are_described() -> None:
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
def test_the_values_of_hyperparameters_are_not_compared(saved: Any, now: Any) -> None:
    for one, other in ((saved, now), (now, saved)):
        assert saved_state.differences(described(one), other.init(PARAMS)) == []
        saved_state.check(described(one), other.init(PARAMS))


ADAMW = optim_zoo.adamw(0.1)
# (optimizer that saved, optimizer that restores, some of the differences, number of differences)
PAIRS = {
    "adam, amsgrad": (
        optim_zoo.adam(0.1),
        optim_zoo.amsgrad(0.1),
        [
            "0 was ScaleByAdamState and is ScaleByAmsgradState",
            "0/nu_max/dense/bias is missing in the checkpoint",
            "0/nu_max/dense/kernel is missing in the checkpoint",
        ],
        3,
    ),
    "sgd, momentum": (
        optim_zoo.sgd(0.1),
        optim_zoo.momentum(0.1),
        [
            "0 was ScaleByLearningRateState and is TraceMomentumState",
            "0/rate is only in the checkpoint",
            "0/momentum/dense/bias is missing in the checkpoint",
            "0/momentum/dense/kernel is missing in the checkpoint",
            "1/rate is missing in the checkpoint",
            "1/step is missing in the checkpoint",
        ],
        8,
    ),
    "adamw, lamb": (
        ADAMW,
        optim_zoo.lamb(0.1),
        [
            "2 was ScaleByLearningRateState and is ScaleByTrustRatioState",
            "2/step is only in the checkpoint",
            '2/trust_ratio/"dense/kernel" is missing in the checkpoint',
        ],
        11,  # three metrics of two leaves, and the new path of the learning rate
    ),
    "clipping": (
        ADAMW,
        optax.chain(optim_zoo.clip_by_global_norm(1.0), ADAMW),
        [
            "0 was ScaleByAdamState and is ClipByGlobalNormState",
            "1 was AddDecayedWeightsState and is tuple",
            "0/gradient_norm is missing in the checkpoint",
            "0/mu/dense/kernel is only in the checkpoint",
            "1/0/mu/dense/kernel is missing in the checkpoint",
        ],
        # the norms of clipping, the moved arrays and containers of AdamW, and two containers
        2 + 2 * 7 + 1 + 2,
    ),
    "accumulation": (
        ADAMW,
        accumulate(ADAMW, 2),
        [
            "the state was tuple and is AccumulateState",
            "1 is only in the checkpoint",
            "2/step is only in the checkpoint",
            "inner/2/step is missing in the checkpoint",
            "sums/dense/kernel is missing in the checkpoint",
        ],
        # all arrays of both, the containers of their decay, and the root
        7 + len(jax.tree.leaves(accumulate(ADAMW, 2).init(PARAMS))) + 2 + 1,
    ),
    "master weights": (
        ADAMW,
        master_weights(ADAMW),
        [
            "the state was tuple and is MasterWeightsState",
            "2/step is only in the checkpoint",
            "inner/2/step is missing in the checkpoint",
            "master/dense/kernel is missing in the checkpoint",
        ],
        # as above, and an empty container for each float32 parameter
        2 * 7 + 2 + 1 + 2,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_state_of_another_optimizer_differs(name: str) -> None:
    one, other, some, count = PAIRS[name]
    lines = saved_state.differences(described(one), other.init(PARAMS))
    assert set(some) <= set(lines)
    assert len(lines) == len(set(lines)) == count
    swap = {"only in": "missing in", "missing in": "only in"}

    def swapped(line: str) -> str:
        line = re.sub(r"was (\S+) and is (\S+)$", r"was \2 and is \1", line)
        return re.sub("only in|missing in", lambda found: swap[found[0]], line)

    assert saved_state.differences(described(other), one.init(PARAMS)) == list(map(swapped, lines))
    for saved, now in ((one, other), (other, one)):
        with pytest.raises(ValueError, match=r"take the optimizer and options it was saved with$"):
            saved_state.check(described(saved), now.init(PARAMS))


def test_other_shapes_and_dtypes_differ() -> None:
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


def test_a_state_may_be_a_single_array() -> None:
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


@pytest.mark.parametrize("version", [1, 2, 4])
def test_a_description_of_another_version_is_refused_in_one_sentence(version: int) -> None:
    """Version 2 has other field names; version 1 did not record containers."""
    saved = {**described(ADAMW), "version": version}
    if version == 1:
        del saved["containers"]
    state = ADAMW.init(PARAMS)
    difference = f"the layout of states was version {version} and is version 3"
    assert saved_state.differences(saved, state) == [difference]
    with pytest.raises(
        ValueError, match=rf"\({difference}\): restore it with the version"
    ) as error:
        saved_state.check(saved, state)
    assert "\n" not in str(error.value)


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
        {"version": 2, "arrays": {}},
        {"version": 2, "arrays": {}, "containers": {"": 1}},
    ],
)
def test_invalid_descriptions_are_refused_in_one_sentence(saved: Any) -> None:
    for function in (saved_state.differences, saved_state.check):
        with pytest.raises(
            ValueError, match="expected a description made by saved_state"
        ) as caught:
            function(saved, ADAMW.init(PARAMS))
        assert "\n" not in str(caught.value)


def test_a_leaf_that_is_not_an_array_is_named() -> None:
    with pytest.raises(TypeError, match="made of arrays, got str at 0/name"):
        saved_state.describe([{"name": "adam"}])


# Every optimizer with its default arguments, and with options that change its formula.
OPTIMIZERS: dict[str, Any] = {
    **{
        name: optim_zoo.registry.OPTIMIZERS[name].constructor(0.1)
        for name in optim_zoo.registry.OPTIMIZERS
        if not optim_zoo.registry.OPTIMIZERS[name].wraps
    },
    "layerwise_adaptive": optim_zoo.layerwise_adaptive(optim_zoo.scale_by_adam(), 0.1),
    "layerwise_adaptive of nadam": optim_zoo.layerwise_adaptive(optim_zoo.scale_by_nadam(), 0.1),
    "lookahead": optim_zoo.lookahead(optim_zoo.adam(0.1)),
    "lookahead of radam": optim_zoo.lookahead(optim_zoo.radam(0.1)),
    "sgd with momentum": optim_zoo.sgd(0.1, 0.9),
    "sgd with Nesterov's momentum": optim_zoo.sgd(0.1, 0.9, nesterov=True),
    "momentum as a moving average": optim_zoo.momentum(0.1, ema=True),
    "rmsprop with momentum": optim_zoo.rmsprop(0.1, momentum=0.9),
    "rmsprop with Nesterov's momentum": optim_zoo.rmsprop(0.1, momentum=0.9, nesterov=True),
    "centered rmsprop": optim_zoo.rmsprop(0.1, centered=True),
    "lars with Nesterov's momentum": optim_zoo.lars(0.1, nesterov=True),
    "lars with the rate outside": optim_zoo.lars(0.1, lr_inside_momentum=False),
    "uncorrected adam": optim_zoo.adam(0.1, bias_correction=False),
    "uncorrected amsgrad": optim_zoo.amsgrad(0.1, bias_correction=False),
    "uncorrected lamb": optim_zoo.lamb(0.1, bias_correction=False),
    "ranger with centralization": optim_zoo.ranger(0.1, gradient_centralization=True),
}
# The same formula under two names.
SAME = [
    {"momentum", "sgd with momentum"},  # the heavy ball
    {"nesterov", "sgd with Nesterov's momentum"},
]


def test_no_two_optimizers_of_the_registry_have_the_same_description() -> None:
    known = {name: described(tx) for name, tx in OPTIMIZERS.items()}
    same = [
        {one, other}
        for one, other in itertools.combinations(known, 2)
        if known[one] == known[other]
    ]
    assert same == SAME
    for one, other in itertools.permutations(known, 2):
        assert (saved_state.differences(known[one], OPTIMIZERS[other].init(PARAMS)) == []) == (
            {one, other} in SAME
        )


def test_a_piece_without_arrays_is_compared_too() -> None:
    centralized = optax.chain(optim_zoo.centralize_gradients(), optim_zoo.adam(0.1))
    decayed = optax.chain(optim_zoo.add_decayed_weights(0.1), optim_zoo.adam(0.1))
    assert saved_state.differences(described(centralized), decayed.init(PARAMS)) == [
        "0 was CentralizeGradientsState and is AddDecayedWeightsState"
    ]
    behind = optax.chain(optim_zoo.adam(0.1), optim_zoo.centralize_gradients())
    alone = optax.chain(optim_zoo.adam(0.1))
    assert saved_state.differences(described(behind), alone.init(PARAMS)) == [
        "1 is only in the checkpoint"
    ]
    for saved, now in ((behind, alone), (alone, behind), (centralized, decayed)):
        with pytest.raises(ValueError, match=r"take the optimizer and options it was saved with$"):
            saved_state.check(described(saved), now.init(PARAMS))


def test_the_state_of_an_nnx_optimizer_keeps_the_names_of_the_pieces() -> None:
    def opt_state(tx: Any) -> Any:
        return nnx.Optimizer(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param).opt_state

    saved = saved_state.describe(opt_state(optim_zoo.adam(0.1)))
    assert saved["arrays"]["0/mu/kernel/value"] == "float32(4, 6)"
    assert saved["containers"] == {
        "": "tuple",
        "0": "ScaleByAdamState",
        "0/mu": "dict",
        "0/nu": "dict",
        "1": "ScaleByLearningRateState",
    }
    saved_state.check(saved, opt_state(optim_zoo.adam(0.2)))
    assert saved_state.differences(saved, opt_state(optim_zoo.radam(0.1))) == [
        "0 was ScaleByAdamState and is ScaleByRadamState"
    ]


def test_a_train_state_and_a_replicated_state_can_be_checked() -> None:
    tx = optim_zoo.lamb(0.1)
    made = TrainState.create(apply_fn=lambda: None, params=PARAMS, tx=tx)
    saved_state.check(described(tx), made.opt_state)
    devices = jax.local_device_count()
    params = jax.tree.map(lambda x: jnp.stack([x] * devices), PARAMS)
    replicated = jax.pmap(tx.init)(params)
    arrays = saved_state.describe(replicated)["arrays"]
    assert arrays["0/mu/dense/kernel"] == f"float32({devices}, 3, 4)"
    saved_state.check(described(tx), jax.tree.map(lambda x: x[0], replicated))


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "accumulate": lambda tx: accumulate(tx, 2),
    "skip_nonfinite": skip_nonfinite,
    "skip_spikes": skip_spikes,
    "with_metrics": with_metrics,
    "master_weights": master_weights,
    "store_state": lambda tx: store_state(tx, {"mu": "bfloat16"}),
    "stochastic_rounding": lambda tx: stochastic_rounding(tx, jax.random.key(3)),
    "stochastic_rounding, rbg": lambda tx: stochastic_rounding(tx, jax.random.key(3, impl="rbg")),
}
STATES = OPTIMIZERS | {
    name: wrap(optim_zoo.lamb(0.1, weight_decay=0.1)) for name, wrap in WRAPPED.items()
}


def started(tx: Any) -> tuple[Tree, Tree]:
    """Returns parameters of two dtypes, and a state whose arrays hold 1, 2, 3, ..."""
    params = {**PARAMS, "low": jnp.ones(5, jnp.bfloat16)}

    def numbered(x: jax.Array) -> jax.Array:
        return jnp.asarray(1 + np.arange(x.size).reshape(x.shape), x.dtype)

    return params, jax.tree.map(numbered, tx.init(params))


def assert_same(one: Tree, other: Tree) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert isinstance(x, jax.Array)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", STATES)
def test_flax_restores_every_state_with_and_without_a_target(name: str) -> None:
    params, state = started(STATES[name])
    saved = serialization.to_bytes(state)
    like = STATES[name].init(params)
    assert_same(jax.tree.map(jnp.asarray, serialization.from_bytes(like, saved)), state)
    assert_rebuilt(STATES[name], params, state, serialization.msgpack_restore(saved))


def assert_rebuilt(tx: Any, params: Tree, state: Tree, restored: Tree) -> None:
    description = json.loads(json.dumps(saved_state.describe(state)))
    with pytest.raises(ValueError, match=r"without a target.*saved_state\.rebuild\(tx\.init"):
        saved_state.check(description, restored)
    rebuilt = saved_state.rebuild(jax.eval_shape(tx.init, params), restored)
    saved_state.check(description, rebuilt)
    assert_same(rebuilt, state)


@pytest.mark.parametrize("name", ["lamb", "master_weights", "stochastic_rounding", "accumulate"])
def test_a_state_restored_by_orbax_without_a_target_is_rebuilt(name: str, tmp_path: Path) -> None:
    params, state = started(STATES[name])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state")
    assert_rebuilt(STATES[name], params, state, restored)
    rebuilt = saved_state.rebuild(state, restored)
    assert_same(*(jax.jit(STATES[name].update)(params, x, params) for x in (rebuilt, state)))


def test_pickle_keeps_the_types_of_containers() -> None:
    for tx in STATES.values():
        state = tx.init(PARAMS)
        restored = pickle.loads(pickle.dumps(state))
        saved_state.check(saved_state.describe(state), restored)
        assert jax.tree.structure(restored) == jax.tree.structure(state)


@pytest.mark.parametrize("kind", ["state", "pure dict", "msgpack"])
def test_the_state_of_an_nnx_optimizer_is_rebuilt(kind: str) -> None:
    tx = skip_nonfinite(with_metrics(optim_zoo.lamb(0.1)))
    optimizer = nnx.Optimizer(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
    state: Any = nnx.state(optimizer)
    if kind != "state":
        state = nnx.to_pure_dict(state)
    if kind == "msgpack":
        state = serialization.msgpack_restore(serialization.to_bytes(state))
    rebuilt = saved_state.rebuild(optimizer.opt_state, state["opt_state"])
    assert_same(rebuilt, optimizer.opt_state)
    saved_state.check(saved_state.describe(optimizer.opt_state), rebuilt)
    with pytest.raises(ValueError, match=r"0/mu/kernel.*(missing in|only in) the checkpoint"):
        saved_state.rebuild(optimizer.opt_state.inner.inner, state["opt_state"]["inner"])


def test_rebuild_refuses_a_state_that_does_not_fit() -> None:
    restored = serialization.to_state_dict(optim_zoo.adam(0.1).init(PARAMS))
    wider = {"dense": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(4)}}
    with pytest.raises(ValueError, match=r"0/mu/dense/kernel was float32\(3, 4\) and is") as caught:
        saved_state.rebuild(optim_zoo.adam(0.1).init(wider), restored)
    assert caught.value.argument == "restored"
    with pytest.raises(ValueError, match="2/step is missing in the checkpoint"):
        saved_state.rebuild(ADAMW.init(PARAMS), restored)
