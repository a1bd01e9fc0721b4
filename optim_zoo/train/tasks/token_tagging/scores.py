"""The held-out metrics of tagged words, each as a sum and the weight by which to divide it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo.train.tasks.base import Batch, WeightedSum
from optim_zoo.train.tasks.token_tagging import entities
from optim_zoo.train.tasks.token_tagging.entities import OUTSIDE, Scheme

MOST_CLASSES = 30  # of a confusion matrix, which would otherwise be too large to read


def loss(logits: jax.Array, batch: Mapping[str, jax.Array]) -> WeightedSum:
    """Returns the cross entropy in nats summed over the words, and their number."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    weights = batch["word_weights"]
    return jnp.sum(losses * weights), jnp.sum(weights)


def of_predictions(
    scheme: Scheme, predicted: jax.Array, batch: Mapping[str, jax.Array]
) -> Mapping[str, WeightedSum]:
    """Returns all metrics but the loss.

    They are ``accuracy``, of words; ``precision``, ``recall`` and ``f1``, of entities (see
    `entities`); ``f1/<class>``; and the confusion matrix of the words' classes, unless there are
    more than 30: ``confusion/<class>/<predicted class>`` is a fraction of the words of a class.

    Args:
      scheme: what the labels mean.
      predicted: ids of the labels, ``(sequences, words)``.
      batch: ``labels`` and ``word_weights``, of the same shape.
    """
    gold, weights = batch["labels"], batch["word_weights"]
    counts = entities.count(scheme, gold, predicted, weights > 0)
    found = {
        "accuracy": (jnp.sum((predicted == gold) * weights), jnp.sum(weights)),
        **entities.scores(counts),
    }
    for index, name in enumerate(scheme.classes):
        correct, guessed, present = (x[index] for x in counts)
        found[f"f1/{_safe(name)}"] = (2 * correct, guessed + present)
    return {**found, **_confusion(scheme, gold, predicted, weights)}


def of_constant(scheme: Scheme, label: int, batches: list[Batch]) -> Mapping[str, float]:
    """Returns accuracy, precision, recall and F1 of giving every word the same label."""
    names = ("labels", "word_weights")
    batch = {n: jnp.asarray(np.concatenate([each[n] for each in batches])) for n in names}
    found = of_predictions(scheme, jnp.full(batch["labels"].shape, label), batch)
    pairs = {name: map(float, found[name]) for name in ("accuracy", "f1", "precision", "recall")}
    return {name: total / weight if weight else 0.0 for name, (total, weight) in pairs.items()}


def _confusion(
    scheme: Scheme, gold: jax.Array, predicted: jax.Array, weights: jax.Array
) -> Mapping[str, WeightedSum]:
    """Returns the share of each predicted class among the words of each class."""
    names = [*scheme.classes, *([OUTSIDE] if OUTSIDE in scheme.labels else [])]
    if len(names) > MOST_CLASSES:
        return {}
    class_of = jnp.asarray(np.where(scheme.class_of < 0, len(names) - 1, scheme.class_of))
    true, guessed = (jax.nn.one_hot(class_of[ids], len(names)) for ids in (gold, predicted))
    table = jnp.einsum("swi,swj->ij", true * weights[..., None], guessed)
    sums = jnp.sum(table, axis=1)
    return {
        f"confusion/{_safe(name)}/{_safe(other)}": (table[row, column], sums[row])
        for row, name in enumerate(names)
        for column, other in enumerate(names)
    }


def _safe(name: str) -> str:
    """Returns the name of a class without slashes, which separate the parts of a metric's name."""
    return name.replace("/", "|")
