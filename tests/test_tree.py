import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.core import freeze

from optim_zoo import tree


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(2, 3, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])


def test_paths_of_dicts_lists_and_named_tuples() -> None:
    params = {
        "encoder": {"layer_0": {"kernel": 1.0}},
        "list": [1.0, {"bias": 2.0}],
        "state": optax.TraceState(trace=3.0),
    }
    assert tree.leaf_paths(params) == [
        "encoder/layer_0/kernel",
        "list/0",
        "list/1/bias",
        "state/trace",
    ]
    assert tree.leaf_paths(freeze({"a": {"b": 1.0}})) == ["a/b"]
    assert tree.leaf_paths(1.0) == [""]


def test_nnx_states_have_the_paths_of_a_pure_dict() -> None:
    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    expected = [f"{layer}/{leaf}" for layer in ("blocks/0", "blocks/1", "dense")
                for leaf in ("bias", "kernel")]  # fmt: skip
    assert tree.leaf_paths(state) == expected
    assert tree.leaf_paths(nnx.to_pure_dict(state)) == expected


class Fields(NamedTuple):
    key: Any
    value: Any


BOXES: dict[str, Callable[[Any], Any]] = {
    "Param": nnx.Param,
    "Partitioned": lambda x: nn.Partitioned(x, names=()),
    "LogicallyPartitioned": lambda x: nn.LogicallyPartitioned(x, names=()),
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_paths_leave_out_the_value_field_of_flax_boxes(box: Callable[[Any], Any]) -> None:
    assert tree.leaf_paths(box(1.0)) == [""]
    assert tree.leaf_paths({"a": [box(1.0), 2.0]}) == ["a/0", "a/1"]
    assert tree.leaf_paths({"a": box(Fields(1.0, 2.0))}) == ["a/key", "a/value"]
    assert tree.leaf_paths({"a": box({"value": box(1.0)})}) == ["a/value"]
    assert tree.leaf_paths({"a": box(None), "b": box(box(1.0))}) == ["b"]


def test_paths_keep_a_value_field_of_other_nodes() -> None:
    assert tree.leaf_paths({"attention": {"value": 1.0}}) == ["attention/value"]
    assert tree.leaf_paths({"attention": Fields(1.0, 2.0)}) == ["attention/key", "attention/value"]
    assert tree.leaf_paths(Fields(key=1.0, value=nnx.Param(2.0))) == ["key", "value"]


def test_leaves_with_path_accepts_is_leaf() -> None:
    boxed = {"a": nnx.Param((1.0, 2.0)), "b": (3.0, 4.0)}
    stops = lambda node: isinstance(node, tuple)  # noqa: E731
    assert tree.leaves_with_path(boxed, is_leaf=stops) == [("a", (1.0, 2.0)), ("b", (3.0, 4.0))]
    ((path, box),) = tree.leaves_with_path(nnx.Param(1.0), is_leaf=lambda x: True)
    assert path == ""
    assert isinstance(box, nnx.Param)


def test_paths_do_not_need_flax() -> None:
    """The core does not import Flax, but recognizes its boxes once the user has imported it."""
    code = (
        "import sys\n"
        "from optim_zoo import tree\n"
        "assert tree.leaf_paths({'a': {'value': 1.0}}) == ['a/value']\n"
        "assert 'flax' not in sys.modules\n"
        "import flax.linen as nn\n"
        "assert tree.leaf_paths({'a': nn.Partitioned(1.0, names=())}) == ['a']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_by_path_returns_a_flat_dict() -> None:
    assert tree.by_path({"a": {"b": 1}, "c": [2, None]}) == {"a/b": 1, "c/0": 2}
    with pytest.raises(ValueError, match="several leaves have the path a/b"):
        tree.by_path({"a/b": 1, "a": {"b": 2}})


def test_map_with_path_passes_the_path_first() -> None:
    lengths = tree.map_with_path(lambda path, x, y: (path, x + y), {"a": [1, 2]}, {"a": [3, 4]})
    assert lengths == {"a": [("a/0", 4), ("a/1", 6)]}


def test_map_to_several_passes_subtrees_of_later_trees_unchanged() -> None:
    added, pairs = tree.map_to_several(
        lambda x, pair: (x + sum(pair), pair), 2, {"a": 1, "b": 2}, {"a": (1, 2), "b": ()}
    )
    assert added == {"a": 4, "b": 2}
    assert pairs == {"a": (1, 2), "b": ()}
    assert tree.map_to_several(lambda x: (x, x), 2, {}) == ({}, {})


def test_trees_with_masked_nodes_are_partial() -> None:
    assert tree.is_partial({})
    assert tree.is_partial({"a": None})
    assert tree.is_partial({"a": 1.0, "b": optax.MaskedNode()})
    assert not tree.is_partial({"a": 1.0, "b": None})


@pytest.mark.parametrize(
    ("dtype", "wide"), [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32")]
)
def test_wide_converts_half_precision_to_float32(dtype: str, wide: str) -> None:
    assert tree.wide(jnp.ones(2, dtype)).dtype == wide
    assert tree.wide_dtype(jnp.ones(2, dtype)) == wide


def test_wide_keeps_float64() -> None:
    with jax.enable_x64(True):
        assert tree.wide(jnp.ones(2, "float64")).dtype == "float64"
