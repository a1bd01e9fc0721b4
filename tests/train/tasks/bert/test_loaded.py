"""A loaded BERT: logits, hidden states, pooled vectors, the tokenizer, and refused input."""

import dataclasses
import functools
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.train.tasks.bert.loaded import LoadedBert, user_tokenizer
from optim_zoo.train.tasks.bert.model import Bert
from optim_zoo.train.tasks.bert.sections import Model
from optim_zoo.train.tasks.bert.vocabulary import SPECIAL_TOKENS, Vocabulary, digest_of
from optim_zoo.train.tasks.masked_language.task import init_bert

pytestmark = pytest.mark.usefixtures("quick_to_compile")

WORDS = ("the", "learning", "rate", "##s", "grow", ".")
TOKENS = (*SPECIAL_TOKENS, *WORDS)
VOCABULARY = Vocabulary(TOKENS, 0, 1, 2, 3, 4, digest_of(TOKENS))
SIZES = MappingProxyType({"num_layers": 2, "hidden_size": 16, "num_heads": 2})
CONFIG = Model(**SIZES, intermediate_size=24, max_positions=40)
CLS, SEP = VOCABULARY.cls, VOCABULARY.sep
UNUSED: Any = None  # the task
IDS = np.array([[CLS, 5, 6, 7, SEP], [CLS, 7, 7, 9, SEP]])


def make(**changes: Any) -> LoadedBert:
    """Returns a model with random parameters of the size that training makes."""
    model = Bert(dataclasses.replace(CONFIG, **changes), VOCABULARY.size)
    shapes = jax.eval_shape(lambda: init_bert(model, 8, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), "f"), shapes)
    words = user_tokenizer(VOCABULARY, model.config.max_positions)
    return LoadedBert(UNUSED, model, params, words, 1, VOCABULARY)


def test_apply_gives_the_models_logits_at_every_position() -> None:
    run = make()
    types = np.array([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]])
    logits = run.apply(IDS, token_type_ids=types)
    assert (logits.shape, logits.dtype) == ((2, 5, VOCABULARY.size), jnp.float32)
    apply = jax.jit(functools.partial(run.model.apply, deterministic=True))
    for row in range(2):
        expected = apply({"params": run.params}, IDS[row], types[row], np.arange(5))
        # The same arithmetic on one sequence instead of two.
        np.testing.assert_allclose(logits[row], expected, rtol=0, atol=1e-5)
    assert np.abs(run.apply(IDS) - logits).max() > 1e-3


@pytest.mark.parametrize("scan_layers", [False, True])
def test_padding_changes_nothing(scan_layers: bool) -> None:
    run = make(scan_layers=scan_layers)
    padded = np.pad(IDS, ((0, 0), (0, 20)), constant_values=VOCABULARY.pad)
    mask = np.pad(np.ones_like(IDS), ((0, 0), (0, 20)))
    plain, encoded = run.apply(IDS), run.encode(IDS)
    # Sums over 25 positions instead of 5, in float32.
    np.testing.assert_allclose(run.apply(padded, mask)[:, :5], plain, rtol=0, atol=1e-5)
    again = run.encode(padded, mask)
    np.testing.assert_allclose(again.hidden_states[:, :, :5], encoded.hidden_states, atol=1e-5)
    np.testing.assert_allclose(again.pooled, encoded.pooled, atol=1e-5)
    assert np.abs(run.apply(padded)[:, :5] - plain).max() > 1e-3  # without a mask it does


def test_encode_returns_every_layer_and_the_mean_of_the_last() -> None:
    run = make()
    states, pooled = run.encode(IDS, [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert (states.shape, states.dtype) == ((3, 2, 5, 16), jnp.float32)
    assert (pooled.shape, pooled.dtype) == ((2, 16), jnp.float32)
    np.testing.assert_allclose(pooled[0], states[-1, 0].mean(0), atol=1e-6)
    np.testing.assert_allclose(pooled[1], states[-1, 1, :3].mean(0), atol=1e-6)
    decode = jax.jit(functools.partial(run.model.apply, method="decode"))
    head = decode({"params": run.params}, states[-1, 0])
    np.testing.assert_allclose(run.apply(IDS)[0], head, rtol=0, atol=1e-5)
    alone = run.encode(IDS, np.zeros_like(IDS))  # only padding
    np.testing.assert_array_equal(alone.pooled, 0)


def test_a_pooler_in_the_parameters_is_used() -> None:
    run = make()
    rng = np.random.default_rng(1)
    pooler = {"kernel": rng.normal(size=(16, 16)).astype("f"), "bias": np.full(16, 0.5, "f")}
    with_pooler = dataclasses.replace(run, params={**run.params, "pooler": pooler})
    states, pooled = with_pooler.encode(IDS)
    expected = np.tanh(np.asarray(states[-1, :, 0]) @ pooler["kernel"] + pooler["bias"])
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(with_pooler.apply(IDS), run.apply(IDS))


def test_the_results_are_float32_also_where_the_arithmetic_is_not() -> None:
    run = make(dtype="bfloat16")
    states, pooled = run.encode(IDS)
    assert {x.dtype for x in (states, pooled, run.apply(IDS))} == {jnp.dtype("float32")}


def test_the_tokenizer_marks_pads_masks_and_cuts_off() -> None:
    words = make().tokenizer
    first, second = words.encode_batch(["The rates grow.", ("the [MASK]", "xyz")])
    assert first.tokens == ["[CLS]", "the", "rate", "##s", "grow", ".", "[SEP]"]
    assert second.tokens == ["[CLS]", "the", "[MASK]", "[SEP]", "[UNK]", "[SEP]", "[PAD]"]
    assert (first.attention_mask, second.attention_mask) == ([1] * 7, [1] * 6 + [0])
    assert second.type_ids[:6] == [0, 0, 0, 0, 1, 1]
    assert second.ids[-1] == VOCABULARY.pad
    assert words.decode(first.ids) == "the rates grow."
    assert len(words.encode("the " * 100).ids) == CONFIG.max_positions


REFUSED: list[tuple[type[Exception], str, Any]] = [
    (ArgumentValueError, "input_ids must have a length from 1 to the 40 ", {"ids": [[5] * 41]}),
    (ArgumentValueError, "input_ids must have a length from 1 to the 40 ", {"ids": IDS[:, :0]}),
    (ArgumentValueError, r"input_ids must be in \[0, 11\), got 11", {"ids": [[5, 11]]}),
    (ArgumentValueError, r"input_ids must be in \[0, 11\), got -1", {"ids": [[-1, 5]]}),
    (ArgumentTypeError, "input_ids must be an array .* same length", {"ids": [[5], [5, 6]]}),
    (ArgumentTypeError, r"input_ids must be an array .* got \(3,\)", {"ids": [5, 6, 7]}),
    (ArgumentTypeError, "input_ids must hold integers, got .*float", {"ids": [[5.0, 6.0]]}),
    (ArgumentTypeError, "input_ids must hold integers", {"ids": [["the"]]}),
    (ArgumentValueError, r"attention_mask must have the shape \(2, 5\)", {"mask": [[1] * 5]}),
    (ArgumentTypeError, "attention_mask must be an array", {"mask": [1] * 5}),
    (ArgumentTypeError, "attention_mask must hold", {"mask": [["x"] * 5] * 2}),
    (ArgumentValueError, r"token_type_ids must be in \[0, 2\), got 2", {"types": IDS % 3}),
    (ArgumentValueError, "token_type_ids must have the shape", {"types": IDS[:, :4] * 0}),
]


@pytest.mark.parametrize(("kind", "message", "changes"), REFUSED)
@pytest.mark.parametrize("method", ["apply", "encode"])
def test_refused_input_is_one_sentence(
    method: str, kind: type[Exception], message: str, changes: dict[str, Any]
) -> None:
    run = LoadedBert(UNUSED, Bert(CONFIG, VOCABULARY.size), {}, None, 1, VOCABULARY)
    arguments = {"ids": IDS, "mask": None, "types": None, **changes}
    with pytest.raises(kind, match=message):
        getattr(run, method)(*arguments.values())


def test_methods_can_be_traced() -> None:
    """A user may differentiate or compile what calls them."""
    run = make()
    logits = jax.jit(lambda ids: run.apply(ids))(jnp.asarray(IDS))
    np.testing.assert_allclose(logits, run.apply(IDS), rtol=0, atol=1e-5)
