"""Entities in sequences of tags, by the rule of CoNLL's ``conlleval``, as array operations.

A tag is ``B-<class>``, which begins an entity, ``I-<class>``, which continues one, or ``O``. An
``I-`` begins an entity where the word before it is in no entity of its class. Any other tag, such
as ``NOUN``, is an entity of its own class and of one word.

A predicted entity is correct if the text has an entity of the same class and the same words.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

OUTSIDE = "O"


class Scheme(NamedTuple):
    """What the labels of a task mean. The id of a label is its index, as is that of a class."""

    labels: tuple[str, ...]  # as in the files, such as ("B-name", "I-name", "O")
    classes: tuple[str, ...]  # such as ("name",), without "O"
    class_of: npt.NDArray[np.int32]  # (labels,): the class of each label; -1 for "O"
    begins: npt.NDArray[np.bool_]  # (labels,): whether the label always begins an entity


class Counts(NamedTuple):
    """The number of entities of each class: arrays ``(classes,)`` float32."""

    correct: jax.Array
    predicted: jax.Array
    gold: jax.Array  # in the text


def scheme(labels: Sequence[str]) -> Scheme:
    """Returns what labels mean."""
    parts = [_parts(label) for label in labels]
    classes = tuple(sorted({name for _, name in parts if name is not None}))
    return Scheme(
        tuple(labels),
        classes,
        np.array([-1 if name is None else classes.index(name) for _, name in parts], np.int32),
        np.array([begins for begins, _ in parts], bool),
    )


def count(scheme: Scheme, gold: jax.Array, predicted: jax.Array, words: jax.Array) -> Counts:
    """Counts the entities in sequences of labels.

    Args:
      scheme: what the labels mean.
      gold: ids of the labels in the text, ``(sequences, length)`` int.
      predicted: ids of the predicted labels, of the same shape.
      words: which positions have a word, of the same shape, bool. The others may hold any ids;
        they follow the words of a sequence.
    """
    gold_class, gold_starts, gold_ends = _entities(scheme, gold, words)
    class_, starts, ends = _entities(scheme, predicted, words)
    correct = gold_starts & starts & (gold_class == class_) & (gold_ends == ends)

    def per_class(chosen: jax.Array, classes: jax.Array) -> jax.Array:
        ids = jnp.arange(len(scheme.classes))[:, None, None]
        return jnp.sum(chosen[None] & (classes[None] == ids), axis=(1, 2)).astype(jnp.float32)

    return Counts(
        per_class(correct, gold_class),
        per_class(starts, class_),
        per_class(gold_starts, gold_class),
    )


def scores(counts: Counts) -> Mapping[str, tuple[jax.Array, jax.Array]]:
    """Returns precision, recall and F1 over all classes, each as a sum and its weight."""
    correct, predicted, gold = (jnp.sum(x) for x in counts)
    return {
        "f1": (2 * correct, predicted + gold),
        "precision": (correct, predicted),
        "recall": (correct, gold),
    }


def _parts(label: str) -> tuple[bool, str | None]:
    """Returns whether a label always begins an entity, and its class (None for "O")."""
    if label == OUTSIDE:
        return False, None
    prefix, dash, name = label.partition("-")
    if dash and name and prefix in ("B", "I"):
        return prefix == "B", name
    return True, label


def _entities(
    scheme: Scheme, labels: jax.Array, words: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns, for each position, its class, whether an entity starts, and where that one ends.

    The class is -1 outside of entities. The end, the position after the last word, only has a
    meaning where an entity starts.
    """
    class_ = jnp.where(words, jnp.asarray(scheme.class_of)[labels], -1)
    before = jnp.pad(class_, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    inside = class_ >= 0
    starts = inside & (jnp.asarray(scheme.begins)[labels] | (before != class_))
    length = labels.shape[1]
    breaks = jnp.where(inside & ~starts, length, jnp.arange(length)[None])
    next_break = jax.lax.cummin(breaks, axis=1, reverse=True)
    ends = jnp.pad(next_break, ((0, 0), (0, 1)), constant_values=length)[:, 1:]
    return class_, starts, ends
