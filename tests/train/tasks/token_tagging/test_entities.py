"""Counts of entities, compared with the rule of conlleval word by word."""

import functools

import jax
import numpy as np
import pytest

from optim_zoo.train.tasks.token_tagging import entities
from tests.train.tasks.token_tagging import conlleval

IOB = ("B-a", "B-b", "I-a", "I-b", "O")
PLAIN = ("B-a", "I-a", "O", "adverb", "noun")


pytestmark = pytest.mark.usefixtures("quick_to_compile")


def random_tags(
    rng: np.random.Generator, number: int, length: int, kinds: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns gold and predicted ids that agree in most places, and which are words."""
    gold = rng.integers(0, kinds, (number, length))
    predicted = np.where(rng.random(gold.shape) < 0.3, rng.integers(0, kinds, gold.shape), gold)
    lengths = rng.integers(0, length + 1, (number, 1))
    return gold, predicted, np.arange(length) < lengths


@pytest.mark.parametrize("labels", [IOB, PLAIN])
def test_counts_are_exactly_those_of_conlleval(
    labels: tuple[str, ...], rng: np.random.Generator
) -> None:
    """Four thousand sequences of up to nine words; the labels of padding are random, too."""
    meaning = entities.scheme(labels)
    gold, predicted, words = random_tags(rng, 4000, 9, len(labels))
    counted = jax.jit(functools.partial(entities.count, meaning))(gold, predicted, words)

    def tags(ids: np.ndarray) -> list[list[str]]:
        return [[labels[i] for i in row[chosen]] for row, chosen in zip(ids, words, strict=True)]

    expected = conlleval.evaluate(tags(gold), tags(predicted))
    for array, by_class in zip(counted, expected, strict=True):
        assert {name: int(value) for name, value in zip(meaning.classes, array, strict=True)} == {
            name: by_class[name] for name in meaning.classes
        }
    assert all(counted.correct > 500)  # otherwise the test would show little


def test_a_few_sequences_by_hand() -> None:
    meaning = entities.scheme(IOB)
    ids = {name: i for i, name in enumerate(IOB)}
    counts_of = jax.jit(functools.partial(entities.count, meaning))

    def count(gold: str, predicted: str) -> tuple[float, float, float]:
        rows = [np.array([[ids[tag] for tag in text.split()]]) for text in (gold, predicted)]
        counts = counts_of(*rows, np.ones(rows[0].shape, bool))
        return tuple(float(x.sum()) for x in counts)  # type: ignore[return-value]

    assert count("B-a I-a O", "B-a I-a O") == (1, 1, 1)
    assert count("B-a I-a O", "B-a O O") == (0, 1, 1)  # another end
    assert count("B-a I-a O", "I-a I-a O") == (1, 1, 1)  # a stray I- begins an entity
    assert count("B-a I-a I-b", "B-a I-a I-b") == (2, 2, 2)  # as does one of another class
    assert count("B-a B-a O", "B-a I-a O") == (0, 1, 2)
    assert count("O O O", "O O O") == (0, 0, 0)


def test_scores_are_sums_and_weights() -> None:
    counts = entities.Counts(*(np.array(x, np.float32) for x in ([1, 2], [3, 4], [4, 5])))
    assert {name: (float(a), float(b)) for name, (a, b) in entities.scores(counts).items()} == {
        "f1": (6, 16),
        "precision": (3, 7),
        "recall": (3, 9),
    }


def test_labels_have_classes_and_other_tags_are_classes_of_their_own() -> None:
    meaning = entities.scheme(("B-x-y", "I-x-y", "O", "B-", "noun", "-"))
    assert meaning.classes == ("-", "B-", "noun", "x-y")
    assert meaning.class_of.tolist() == [3, 3, -1, 1, 2, 0]
    assert meaning.begins.tolist() == [True, False, False, True, True, True]
