"""The trees of parameters that the benchmarks measure, as shapes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import harness
from optim_zoo import rules
from optim_zoo.train.tasks.bert.model import Bert, layer_rules
from optim_zoo.train.tasks.bert.sections import Model
from optim_zoo.tree import Tree

VOCABULARY_SIZE = 30_522  # of the uncased models of google-research/bert

BERT_TINY = Model(scan_layers=False)
BERT_BASE = Model(
    num_layers=12, hidden_size=768, num_heads=12, intermediate_size=3072, scan_layers=False
)
BERT_BASE_SCAN = Model(
    num_layers=12, hidden_size=768, num_heads=12, intermediate_size=3072, scan_layers=True
)
BERT_LARGE = Model(
    num_layers=24, hidden_size=1024, num_heads=16, intermediate_size=4096, scan_layers=False
)


def bert_tree(model: Model) -> tuple[Tree, rules.Rules]:
    """Returns the shapes of BERT's parameters, and the rules that define its layers."""
    ids = jax.ShapeDtypeStruct((1,), jnp.int32)
    init = functools.partial(Bert(model, VOCABULARY_SIZE).init, deterministic=True)
    variables: Any = jax.eval_shape(init, jax.random.key(0), ids, ids, ids)
    return variables["params"], layer_rules(model)


TREES: Mapping[str, Callable[[], tuple[Tree, rules.Rules]]] = {
    "bert-tiny": lambda: bert_tree(BERT_TINY),
    "bert-base": lambda: bert_tree(BERT_BASE),
    "bert-base-scan": lambda: bert_tree(BERT_BASE_SCAN),
    "bert-large": lambda: bert_tree(BERT_LARGE),
    "small-leaves": lambda: (harness.square_leaves(20_000_000, 2000), ()),
}
