"""A tiny BERT for the tests of this folder."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optim_zoo.train.tasks.bert.model import Bert
from optim_zoo.train.tasks.bert.sections import Model
from optim_zoo.train.tasks.bert.vocabulary import SPECIAL_TOKENS, Vocabulary, of_tokens
from optim_zoo.tree import Tree

RECORDED = Path(__file__).parent / "recorded"
SIZES: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 16,
    "num_heads": 4,
    "intermediate_size": 20,
    "max_positions": 12,
}
LOWER = of_tokens([*SPECIAL_TOKENS, "the", "rate", "##s", ".", "é"], "lower")
ACCENTED = "ÜüÉéï"
CASED = of_tokens([*SPECIAL_TOKENS, "A", "a", "Über", "uber", "café", "cafe", "##é"], "cased")


def model(**changes: Any) -> Model:
    return Model(**{**SIZES, **changes})


def params(sizes: Model, vocabulary: Vocabulary, seed: int = 0) -> Tree:
    """Returns random parameters; all differ, so that no two can be exchanged unnoticed."""
    ids = jnp.zeros(4, jnp.int32)
    shapes = jax.eval_shape(
        lambda: Bert(sizes, vocabulary.size).init(
            jax.random.key(0), ids, ids, ids[:1], deterministic=True
        )["params"]
    )
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def logits(sizes: Model, vocabulary: Vocabulary, tree: Tree, *batch: Any) -> jax.Array:
    """Returns the logits of ids, types and mask, ``(batch, length)`` each, at every position."""
    made: jax.Array = _logits(Bert(sizes, vocabulary.size), tree, *map(jnp.asarray, batch))
    return made


@functools.partial(jax.jit, static_argnums=0)
def _logits(bert: Bert, tree: Tree, *batch: jax.Array) -> Any:
    return jax.vmap(lambda *row: bert.apply({"params": tree}, *row, method="logits"))(*batch)
