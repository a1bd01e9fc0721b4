"""BERT compared with a float64 NumPy forward pass; parameters, stacking, dropout, bfloat16."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

import optim_zoo
from optim_zoo.train.tasks.bert.model import Bert, Encoder, layer_rules
from optim_zoo.train.tasks.bert.sections import Model
from optim_zoo.train.tasks.masked_language.task import init_bert, masked_loss
from optim_zoo.tree import Tree, by_path, leaf_paths

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SMALL = Model(num_layers=3, hidden_size=24, num_heads=4, intermediate_size=40, max_positions=20)
VOCABULARY = 50
ROWS, LENGTH, MASKED = 6, 12, 3
Array = npt.NDArray[np.float64]
IN_LAYER = {
    *(
        f"attention/{n}/{p}"
        for n in ("query", "key", "value", "output")
        for p in ("kernel", "bias")
    ),
    *(f"{n}/{p}" for n in ("intermediate", "output") for p in ("kernel", "bias")),
    *(f"{n}_LayerNorm/{p}" for n in ("attention", "output") for p in ("scale", "bias")),
}
OUTSIDE = {
    *(f"embeddings/{n}_embeddings/embedding" for n in ("word", "position", "token_type")),
    *(f"embeddings/LayerNorm/{p}" for p in ("scale", "bias")),
    *(f"masked_language/transform/{p}" for p in ("kernel", "bias")),
    *(f"masked_language/LayerNorm/{p}" for p in ("scale", "bias")),
    "output_bias",
}


def make(**changes: Any) -> Bert:
    return Bert(dataclasses.replace(SMALL, **changes), VOCABULARY)


def random_params(model: Bert, seed: int = 0) -> Tree:
    """Returns parameters with random leaves, so that no bias or scale is 0 or 1."""
    shapes = jax.eval_shape(lambda: init_bert(model, LENGTH, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape).astype(np.float32)), shapes
    )


def stack(params: Tree) -> Tree:
    """Returns the parameters of an unscanned model in the layout of a scanned one."""
    encoder = params["encoder"]
    layers = [encoder[f"layer_{i}"] for i in range(len(encoder))]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    return {**params, "encoder": {"layers": stacked}}


def batch(seed: int = 1, dropout: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {
        "input_ids": rng.integers(0, VOCABULARY, (ROWS, LENGTH), np.int32),
        "type_ids": rng.integers(0, 2, (ROWS, LENGTH), np.int32),
        "masked_positions": np.sort(
            [rng.choice(LENGTH, MASKED, replace=False) for _ in range(ROWS)]
        ).astype(np.int32),
        "masked_targets": rng.integers(0, VOCABULARY, (ROWS, MASKED), np.int32),
        "masked_weights": rng.integers(0, 2, (ROWS, MASKED)).astype(np.float32),
    }
    if dropout:
        made["dropout_keys"] = rng.integers(0, 1 << 32, (ROWS, 2), np.uint32)
    return made


def logits(model: Bert, params: Tree, made: dict[str, np.ndarray]) -> Array:
    def one(ids: jax.Array, types: jax.Array, positions: jax.Array) -> jax.Array:
        return model.apply({"params": params}, ids, types, positions, deterministic=True)

    columns = (made["input_ids"], made["type_ids"], made["masked_positions"])
    return np.asarray(jax.jit(jax.vmap(one))(*columns), np.float64)


def gradients(model: Bert, params: Tree, made: dict[str, np.ndarray]) -> Tree:
    return jax.jit(jax.grad(lambda p: masked_loss(model, p, made)[0]))(params)


# The independent reference: one sequence, plain NumPy in float64, written from the paper
# (arXiv 1810.04805, arXiv 1706.03762) and the conventions of google-research/bert modeling.py.


def reference_layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * scale + bias


def reference_gelu(x: Array, activation: str) -> Array:
    """GELU (arXiv 1606.08415): ``x`` times the normal distribution function, and its estimate."""
    if activation == "gelu":
        return x * np.vectorize(lambda each: (1 + math.erf(each / math.sqrt(2))) / 2)(x)
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def reference_logits(
    p: dict[str, Array],
    model: Model,
    ids: Array,
    types: Array,
    positions: Array,
    mask: Array | None = None,
) -> Array:
    kept = np.ones(len(ids), bool) if mask is None else mask != 0

    def dense(name: str, x: Array) -> Array:
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    def norm(name: str, x: Array) -> Array:
        return reference_layer_norm(x, p[f"{name}/scale"], p[f"{name}/bias"])

    size = model.hidden_size // model.num_heads
    table = p["embeddings/word_embeddings/embedding"]
    x = np.empty((len(ids), model.hidden_size))
    for t, (token, kind) in enumerate(zip(ids, types, strict=True)):
        x[t] = (
            table[token]
            + p["embeddings/position_embeddings/embedding"][t]
            + p["embeddings/token_type_embeddings/embedding"][kind]
        )
    x = norm("embeddings/LayerNorm", x)
    for i in range(model.num_layers):
        layer = f"encoder/layer_{i}"
        query, key, value = (dense(f"{layer}/attention/{n}", x) for n in ("query", "key", "value"))
        mixed = np.empty_like(x)
        for head in range(model.num_heads):
            own = slice(head * size, (head + 1) * size)
            scores = query[:, own] @ key[:, own].T / math.sqrt(size)
            weights = np.exp(scores - scores.max(-1, keepdims=True)) * kept
            weights /= weights.sum(-1, keepdims=True)
            mixed[:, own] = weights @ value[:, own]
        x = norm(f"{layer}/attention_LayerNorm", x + dense(f"{layer}/attention/output", mixed))
        hidden = reference_gelu(dense(f"{layer}/intermediate", x), model.activation)
        x = norm(f"{layer}/output_LayerNorm", x + dense(f"{layer}/output", hidden))
    chosen = np.stack([x[t] for t in positions])
    transformed = reference_gelu(dense("masked_language/transform", chosen), model.activation)
    return norm("masked_language/LayerNorm", transformed) @ table.T + p["output_bias"]


def wide(params: Tree) -> dict[str, Array]:
    return {path: np.asarray(x, np.float64) for path, x in by_path(params).items()}


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_logits_agree_with_an_independent_float64_forward_pass(activation: str) -> None:
    model, made = make(scan_layers=False, activation=activation), batch()
    params = random_params(model)
    expected = np.stack(
        [
            reference_logits(wide(params), model.config, *row)
            for row in zip(
                made["input_ids"], made["type_ids"], made["masked_positions"], strict=True
            )
        ]
    )
    assert np.std(expected) > 0.5  # the reference must not be constant
    # Three layers in float32 make about 30 roundings of 6e-8, relative to logits of a few units.
    np.testing.assert_allclose(logits(model, params, made), expected, rtol=0, atol=2e-5)


def test_bert_uses_the_exact_activation_by_default() -> None:
    """google-research/bert wrote the tanh form later, but its ``hidden_act`` is the exact one."""
    params = random_params(make())
    exact, default, tanh = (
        logits(make(**changes), params, batch())
        for changes in ({"activation": "gelu"}, {}, {"activation": "gelu_tanh"})
    )
    np.testing.assert_array_equal(default, exact)
    assert 1e-4 < np.abs(tanh - exact).max() < 1e-2


@pytest.mark.parametrize("scan_layers", [False, True])
def test_masked_positions_are_not_read(scan_layers: bool) -> None:
    model, made = make(scan_layers=scan_layers), batch()
    params = random_params(model)
    mask = np.ones(LENGTH, np.int32)
    mask[[2, 7, LENGTH - 1]] = 0
    positions = np.flatnonzero(mask)

    @jax.jit
    def apply(ids: jax.Array, mask: jax.Array) -> jax.Array:
        args = (ids, made["type_ids"][0], positions, mask)
        return model.apply({"params": params}, *args, deterministic=True)

    ids = made["input_ids"][0]
    masked = np.asarray(apply(ids, mask), np.float64)
    # -1e38 in the softmax is exactly 0, whatever the tokens are.
    others = np.where(mask == 1, ids, (ids + 7) % VOCABULARY)
    np.testing.assert_array_equal(apply(others, mask), masked)
    assert np.abs(apply(ids, np.ones_like(mask)) - masked).max() > 1e-4
    assert np.isfinite(apply(ids, np.zeros_like(mask))).all()
    if not scan_layers:
        row = (ids, made["type_ids"][0], positions, mask)
        # Three layers in float32 make about 30 roundings of 6e-8, as above.
        expected = reference_logits(wide(params), model.config, *row)
        np.testing.assert_allclose(masked, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_all_layers_are_the_outputs_of_shallower_encoders(scan_layers: bool) -> None:
    made = batch()
    params = random_params(make(scan_layers=scan_layers))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def encode(layers: int, all_layers: bool = False) -> jax.Array:
        model = make(scan_layers=scan_layers, num_layers=layers)
        own = dict(params)
        if scan_layers:
            own["encoder"] = jax.tree.map(lambda x: x[:layers], params["encoder"])
        args = (made["input_ids"][0], made["type_ids"][0])
        options = {"deterministic": True, "all_layers": all_layers, "method": "encode"}
        return model.apply({"params": own}, *args, **options)

    every = encode(3, True)
    assert every.shape == (4, LENGTH, 24)
    for layers in (1, 2, 3):
        # The same arithmetic, compiled with other layers around it.
        np.testing.assert_allclose(every[layers], encode(layers), rtol=0, atol=1e-5)
    embed = functools.partial(
        make().apply, method=lambda model, *args: model.embeddings(*args, True)
    )
    embedded = jax.jit(embed)({"params": params}, made["input_ids"][0], made["type_ids"][0])
    np.testing.assert_allclose(every[0], embedded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_parameter_paths_are_the_documented_ones(scan_layers: bool) -> None:
    """Users write patterns and rules for these paths."""
    names = ["layers"] if scan_layers else ["layer_0", "layer_1", "layer_2"]
    expected = OUTSIDE | {f"encoder/{name}/{path}" for name in names for path in IN_LAYER}
    params = random_params(make(scan_layers=scan_layers))
    assert set(leaf_paths(params)) == expected
    shape = by_path(params)[f"encoder/{names[0]}/attention/query/kernel"].shape
    assert shape == ((3, 24, 24) if scan_layers else (24, 24))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_initialized_as_in_bert_and_in_float32(dtype: str) -> None:
    """Kernels and embeddings are truncated normal with scale 0.02, biases 0, LayerNorm scales 1."""
    model = make(num_layers=2, hidden_size=64, intermediate_size=256, dtype=dtype)
    init = jax.jit(lambda key: init_bert(model, LENGTH, key))
    for path, x in by_path(init(jax.random.key(0))).items():
        assert x.dtype == np.float32, path
        kind = path.split("/")[-1]
        if kind in ("bias", "output_bias"):
            np.testing.assert_array_equal(x, 0)
        elif kind == "scale":
            np.testing.assert_array_equal(x, 1)
        elif x.size > 1000:
            # tf.truncated_normal_initializer(0.02) truncates at two standard deviations, which
            # leaves a standard deviation of 0.88 times the scale.
            assert np.abs(x).max() <= 0.04
            assert np.std(x) == pytest.approx(0.0176, rel=0.05)


def test_stacked_layers_are_initialized_differently() -> None:
    params = jax.jit(lambda key: init_bert(make(), LENGTH, key))(jax.random.key(0))
    kernel = params["encoder"]["layers"]["attention"]["query"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


def test_scanned_and_unscanned_models_give_the_same_logits() -> None:
    model, scanned = make(scan_layers=False), make(scan_layers=True)
    params = random_params(model)
    assert jax.tree.structure(stack(params)) == jax.tree.structure(random_params(scanned))
    # The same float32 arithmetic, perhaps in another order of sums.
    np.testing.assert_allclose(
        logits(scanned, stack(params), batch()), logits(model, params, batch()), atol=1e-5
    )


@pytest.mark.slow
def test_scanned_and_unscanned_models_have_the_same_gradients() -> None:
    model, scanned = make(scan_layers=False), make(scan_layers=True)
    params = random_params(model)
    separate = by_path(stack(gradients(model, params, batch())))
    for path, x in by_path(gradients(scanned, stack(params), batch())).items():
        size = np.linalg.norm(np.asarray(separate[path]))
        # Softmax does not depend on the bias of the keys, so its gradient is only rounding error.
        tolerance = 1e-4 if path.endswith("key/bias") else 1e-4 * size
        assert np.linalg.norm(np.asarray(x - separate[path])) <= tolerance, path


def test_scanned_and_unscanned_models_take_the_same_lamb_steps() -> None:
    """Both models receive equal gradients, because Adam would amplify rounding errors."""
    exclude = ["bias", "LayerNorm"]
    start = random_params(make(scan_layers=False))
    rng = np.random.default_rng(3)
    pushes = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f"), start) for _ in "123"]

    def train(params: Tree, pushes: list[Tree], model: Bert) -> Tree:
        tx = optim_zoo.lamb(
            0.01,
            weight_decay=0.01,
            exclude_from_weight_decay=exclude,
            exclude_from_layer_adaptation=exclude,
            layers=layer_rules(model.config),
        )

        @jax.jit
        def step(params: Tree, state: Any, push: Tree) -> tuple[Tree, Any]:
            updates, state = tx.update(push, state, params)
            return jax.tree.map(jnp.add, params, updates), state

        state = tx.init(params)
        for push in pushes:
            params, state = step(params, state, push)
        return params

    separate = by_path(stack(train(start, pushes, make(scan_layers=False))))
    stacked_start = by_path(stack(start))
    together = by_path(train(stack(start), [stack(p) for p in pushes], make(scan_layers=True)))
    for path, x in stacked_start.items():
        moved = np.linalg.norm(np.asarray(separate[path] - x))
        assert moved > 1e-2, path
        assert np.linalg.norm(np.asarray(together[path] - separate[path])) <= 2e-6 * moved, path


def test_positions_gather_their_rows() -> None:
    model, made = make(), batch()
    params = random_params(model)
    everywhere = {**made, "masked_positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))}
    expected = np.take_along_axis(
        logits(model, params, everywhere), made["masked_positions"][:, :, None], axis=1
    )
    np.testing.assert_allclose(logits(model, params, made), expected, atol=1e-5)


def test_layer_rules_match_only_the_stacked_leaves() -> None:
    assert layer_rules(make(scan_layers=False).config) == []
    tx = optim_zoo.scale_by_trust_ratio(layers=layer_rules(SMALL))
    state: Any = tx.init(random_params(make()))
    for path, ratio in state.trust_ratio.items():
        assert ratio.shape == ((3,) if path.startswith("encoder/layers/") else ()), path


# Dropout


compiled_loss = jax.jit(masked_loss, static_argnums=(0, 3))


def loss(model: Bert, params: Tree, made: Tree, deterministic: bool = False) -> float:
    total, weight = compiled_loss(model, params, made, deterministic)
    return float(total / weight)


def test_dropout_depends_only_on_the_key() -> None:
    model = make(dropout=0.3)
    params, made = random_params(model), batch(dropout=True)
    other = {**made, "dropout_keys": made["dropout_keys"] + np.uint32(1)}
    assert loss(model, params, made) == loss(model, params, made)
    assert abs(loss(model, params, made) - loss(model, params, other)) > 1e-3
    assert abs(loss(model, params, made) - loss(model, params, made, deterministic=True)) > 1e-3
    without = {name: x for name, x in made.items() if name != "dropout_keys"}
    assert loss(model, params, without) == loss(model, params, made, deterministic=True)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_dropout_does_not_depend_on_the_order_of_the_rows(scan_layers: bool) -> None:
    """It follows that it does not depend on the split among devices and micro-batches."""
    model = make(dropout=0.3, scan_layers=scan_layers)
    params, made = random_params(model), batch(dropout=True)
    order = np.random.default_rng(5).permutation(ROWS)
    permuted = {name: x[order] for name, x in made.items()}
    # The sum over rows is taken in another order.
    assert loss(model, params, permuted) == pytest.approx(loss(model, params, made), rel=1e-5)
    keys_alone = {**made, "dropout_keys": made["dropout_keys"][order]}
    assert abs(loss(model, params, keys_alone) - loss(model, params, made)) > 1e-3


@pytest.mark.parametrize("scan_layers", [False, True])
def test_each_layer_has_its_own_dropout_mask(scan_layers: bool) -> None:
    model = make(dropout=0.5, scan_layers=scan_layers, num_layers=2)

    def leaf(path: Any, x: jax.Array) -> jax.Array:
        # Each layer adds its mask to its input: the bias of attention's output is 1, all kernels
        # are 0, and LayerNorm and the residual branch pass the sum on.
        ones = jax.tree_util.keystr(path).endswith(("['scale']", "['attention']['output']['bias']"))
        return jnp.full_like(x, float(ones))

    params = jax.tree.map_with_path(leaf, random_params(model)["encoder"])
    encode = jax.jit(
        lambda params, key: Encoder(model.config).apply(
            {"params": params}, jnp.zeros((LENGTH, 24)), False, rngs={"dropout": key}
        )
    )
    rows = np.round(encode(params, jax.random.key(0)), 3)
    # Two different masks give four values per row; equal masks would give two.
    assert max(len(np.unique(row)) for row in rows) == 4


def test_bfloat16_applies_to_the_arithmetic_and_not_to_the_parameters() -> None:
    narrow, full = make(dtype="bfloat16"), make()
    params, made = random_params(full), batch()
    exact = logits(full, params, made)
    rounded = logits(narrow, params, made)
    assert np.isfinite(rounded).all()
    difference = np.abs(rounded - exact).max()
    # Eight bits of precision through three layers give a difference of a few percent.
    assert 1e-4 < difference < 0.2
    assert loss(narrow, params, made) == pytest.approx(loss(full, params, made), rel=0.02)
    for path, x in by_path(gradients(narrow, params, made)).items():
        assert x.dtype == np.float32, path
        assert np.isfinite(x).all(), path
    text = str(jax.make_jaxpr(lambda p: masked_loss(narrow, p, made)[0])(params))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) > 1
    wide = [line for line in products if "bf16[" not in line.split("=")[0]]
    assert (
        len(wide) == 1
    )  # the logits stay in float32, because the loss depends on their differences


def count(model: Model) -> int:
    made = Bert(model, 30_522)
    shapes = jax.eval_shape(lambda: init_bert(made, 128, jax.random.key(0)))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def by_hand(layers: int, size: int, wide: int, vocabulary: int = 30_522) -> int:
    """Returns the number of parameters of BERT with the masked-language head, without pooler."""
    embeddings = (vocabulary + 512 + 2) * size + 2 * size
    attention = 4 * (size * size + size)
    feed_forward = size * wide + wide + wide * size + size
    head = size * size + size + 2 * size + vocabulary
    return embeddings + layers * (attention + feed_forward + 2 * 2 * size) + head


@pytest.mark.parametrize("scan_layers", [False, True])
def test_bert_large_and_base_have_the_published_numbers_of_parameters(scan_layers: bool) -> None:
    """335,174,458 and 109,514,298: the masked-language checkpoints bert-large- and -base-uncased.

    The paper's 340 M and 110 M (arXiv 1810.04805, section 3) are these, rounded.
    """
    large = Model(24, 1024, 16, 4096, scan_layers=scan_layers)
    assert count(large) == by_hand(24, 1024, 4096) == 335_174_458
    base = Model(12, 768, 12, 3072, scan_layers=scan_layers)
    assert count(base) == by_hand(12, 768, 3072) == 109_514_298
