import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim_zoo import layerwise_decay, rules, split, stacked
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.tree import by_path

BERT = {
    "embeddings": {"word": jnp.ones((5, 2)), "norm": jnp.ones(2)},
    "encoder": {
        "layers": {"qkv": jnp.ones((3, 2, 6)), "bias": jnp.ones((3, 6))},
        "norm": jnp.ones(2),
    },
    "head": jnp.ones(3),
}


def _factors(params: Any, made: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the factor of each leaf, and checks that every rule is needed by a leaf."""
    rules.check_matches("made", [pattern for pattern, _ in made], params)
    return {path: rules.first_match(made, path, 1.0) for path in by_path(params)}


STACKS: dict[str, Any] = {
    "one rule": [("encoder/layers/", stacked(0))],
    "a rule for a part of the stack": [
        ("layers/qkv", (stacked(0), split(-1, 3))),
        ("encoder/layers/", stacked(0)),
    ],
    "the first stack of several": [("encoder/layers/", (stacked(0), stacked(1)))],
    "a rule that only splits": [("layers/", stacked(0)), ("embeddings/word", split(1, 2))],
}


@pytest.mark.parametrize("layers", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("shapes", [False, True], ids=["arrays", "shapes"])
def test_the_layers_of_a_stack_have_consecutive_depths(layers: Any, shapes: bool) -> None:
    params = jax.eval_shape(lambda: BERT) if shapes else BERT
    factors = _factors(params, layerwise_decay(params, 0.5, layers=layers))
    assert factors.pop("encoder/layers/qkv").tolist() == [0.125, 0.25, 0.5]
    assert factors.pop("encoder/layers/bias").tolist() == [0.125, 0.25, 0.5]
    assert factors == {
        "embeddings/word": 0.0625,
        "embeddings/norm": 0.0625,
        "encoder/norm": 1.0,
        "head": 1.0,
    }


def test_entries_are_in_order_from_the_bottom_to_the_top() -> None:
    params = {"stem": 1.0, "a": jnp.ones((2, 2)), "b": jnp.ones((4, 3)), "c": 1.0, "z_embed": 1.0}
    layers = ["stem", ("^a", stacked(-1)), ("^b", stacked(1)), "c|z"]
    factors = _factors(params, layerwise_decay(params, 0.5, layers=layers))
    # No leaf is above the last entry, so that it is the top, and an entry wins over a name.
    assert (factors["stem"], factors["c"], factors["z_embed"]) == (2**-6, 1, 1)
    vector, along = factors["a"]
    assert (vector.tolist(), along) == ([2**-5, 2**-4], stacked(-1))
    vector, along = factors["b"]
    assert (vector.tolist(), along) == ([2**-3, 2**-2, 2**-1], stacked(1))


@pytest.mark.parametrize(
    "name",
    ["layer_{}", "blocks/{}", "h_{}", "transformer/h/{}", "encoderblock_{}", "TransformerLayer_{}"],
)
def test_numbered_names_give_the_depths(name: str) -> None:
    numbers = [0, 2, 10, 11]  # numbers, not text: 2 is below 10
    params = {f"{name.format(i)}/Dense_{k}/kernel": 1.0 for i in numbers for k in (0, 1)}
    params |= {"pos_Embedding": 1.0, "wte": 1.0, "unembed": 1.0, "LayerNorm_0": 1.0, "Dense_0": 1.0}
    factors = _factors(params, layerwise_decay(params, 0.5))
    for depth, i in enumerate(numbers, 1):
        for k in (0, 1):
            assert factors[f"{name.format(i)}/Dense_{k}/kernel"] == 0.5 ** (5 - depth)
    assert factors["pos_Embedding"] == factors["wte"] == 0.5**5
    assert factors["unembed"] == factors["LayerNorm_0"] == factors["Dense_0"] == 1


def test_the_depths_are_those_of_beit() -> None:
    """``get_num_layer_for_vit`` and ``LayerDecayValueAssigner`` of microsoft/unilm's BEiT."""
    blocks, decay = 4, 0.75
    num_layers = blocks + 2
    values = [decay ** (num_layers - 1 - i) for i in range(num_layers)]
    ids = {"cls_token": 0, "mask_token": 0, "pos_embed": 0, "patch_embed/proj/weight": 0}
    ids |= {f"blocks/{i}/attn/qkv/weight": i + 1 for i in range(blocks)}
    ids |= {"norm/weight": num_layers - 1, "head/weight": num_layers - 1}
    factors = _factors(dict(ids), layerwise_decay(dict.fromkeys(ids, 1.0), decay))
    np.testing.assert_allclose([factors[k] for k in ids], [values[i] for i in ids.values()], 1e-15)


def test_a_decay_may_be_1_or_traced() -> None:
    layers = [("encoder/layers/", stacked(0))]
    factors = _factors(BERT, layerwise_decay(BERT, 1, layers=layers))
    assert all(np.all(np.asarray(factor) == 1) for factor in factors.values())
    traced = jax.jit(lambda decay: [f for _, f in layerwise_decay(BERT, decay, layers=layers)])(0.5)
    assert [np.asarray(factor).tolist() for factor in traced] == [[0.125, 0.25, 0.5], 0.0625]


@pytest.mark.parametrize(
    ("params", "decay", "layers", "error", "message"),
    [
        (BERT, 0.0, (), ArgumentValueError, r"^decay must be in \(0, 1\], got 0"),
        (BERT, 1.1, (), ArgumentValueError, r"^decay must be in \(0, 1\], got 1.1"),
        (BERT, "x", (), ArgumentTypeError, r"^decay must be a number"),
        (BERT, 0.9, (), ArgumentValueError, r"layers must say what the layers are, .*\(pattern, "),
        ({}, 0.9, (), ArgumentValueError, "layers must say what the layers are"),
        (BERT, 0.9, [("qkv", split(-1, 3))], ArgumentValueError, "must say what the layers are"),
        (
            {"encoder/layer_0": 1.0, "decoder/layer_0": 1.0},
            0.9,
            (),
            ArgumentValueError,
            "received numbers behind decoder/layer_, encoder/layer_",
        ),
        (BERT, 0.9, "encoder", ArgumentTypeError, r"^layers must be .* write \['encoder'\]"),
        (
            BERT,
            0.9,
            [3],
            ArgumentTypeError,
            r"^layers must be a list of path patterns and of pairs",
        ),
        (BERT, 0.9, ["("], ArgumentValueError, r"^layers: '\(' is not a regular expression"),
        (BERT, 0.9, [("encoder", 0)], ArgumentTypeError, r"the value of 'encoder' must be stacked"),
        (BERT, 0.9, ["encodre"], ArgumentValueError, r"^layers: 'encodre' matches no leaf"),
        (
            {"layer_1": 1.0, "layer_10": 1.0},
            0.9,
            ["layer_1", "layer_10"],
            ArgumentValueError,
            r"^layers: earlier entries match all leaves of 'layer_10': end a pattern",
        ),
        (
            BERT,
            0.9,
            [("encoder", stacked(0))],
            ArgumentValueError,
            r"same number of layers, got encoder/layers/bias \(3\), .*, encoder/norm \(2\)",
        ),
        (
            BERT,
            0.9,
            [("head", stacked(1))],
            ArgumentValueError,
            r"^layers: head has shape \(3,\) and no axis 1",
        ),
        (
            {"a": {"b": jnp.ones((2, 2)), "c": jnp.ones((3, 3))}},
            0.9,
            [("b", stacked(0)), ("a/", stacked(1))],
            ArgumentValueError,
            r"got b \(2\), a/ \(3\)",
        ),
    ],
    ids=lambda x: re.sub(r"\W+", "-", str(x))[:30] if isinstance(x, str) else "",
)
def test_wrong_arguments_raise(
    params: Any, decay: Any, layers: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        layerwise_decay(params, decay, layers=layers)
