"""Whole-word masking: no word is masked in part, and each as likely as another of its length."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from optim_zoo.train.tasks.bert.vocabulary import SPECIAL_TOKENS, Vocabulary, digest_of
from optim_zoo.train.tasks.masked_language import words
from optim_zoo.train.tasks.masked_language.batches import Batch, held_out_batches, masked_batch
from tests.train.tasks.masked_language.small_text import restored

TOKENS = (*SPECIAL_TOKENS, "a", "b", "##c", "##d")
VOCABULARY = Vocabulary(TOKENS, 0, 1, 2, 3, 4, digest_of(TOKENS))
PAD, UNK, CLS, SEP, MASK, A, B, C, D = range(9)
WHOLE: Mapping[str, Any] = {"seed": 0, "sequence_length": 40, "whole_words": True}


def stream(size: int = 4000) -> np.ndarray:
    """Returns text of words of one to four pieces, with a few special tokens in it."""
    return np.random.default_rng(0).choice(
        [UNK, SEP, A, B, C, D], size, p=[0.05, 0.05] + [0.225] * 4
    )


def groups(row: np.ndarray) -> list[list[int]]:
    """Returns the positions of each word, found one token after the other."""
    found: list[list[int]] = []
    for place, token in enumerate(row):
        follows = token in (C, D) and place > 0 and row[place - 1] in (A, B, C, D)
        if follows:
            found[-1].append(place)
        elif token in (A, B, C, D):
            found.append([place])
    return found


def check_rows(batch: Batch, most: int) -> None:
    assert batch["masked_positions"].shape[1] == most
    assert (np.diff(batch["masked_positions"], axis=1) > 0).all()
    for row, places, weights in zip(
        restored(batch), batch["masked_positions"], batch["masked_weights"], strict=True
    ):
        masked = set(places[weights > 0].tolist())
        in_row = groups(row)
        assert masked <= {place for word in in_row for place in word}
        parts = {len(masked & set(word)) / len(word) for word in in_row}
        assert parts <= {0.0, 1.0}
        left = [len(word) for word in in_row if word[0] not in masked]
        assert all(len(masked) + size > most for size in left)  # no word that fits is left out


@pytest.mark.parametrize(("rate", "most"), [(0.15, 6), (0.5, 20), (0.01, 1), (0.99, 40)])
def test_words_are_masked_with_all_of_their_pieces(rate: float, most: int) -> None:
    text = stream()
    batch = masked_batch(text, VOCABULARY, **WHOLE, step=3, batch_size=30, masking_rate=rate)
    check_rows(batch, most)
    again = masked_batch(text, VOCABULARY, **WHOLE, step=3, batch_size=30, masking_rate=rate)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, again[name])
    options = {"batch_size": 8, "num_batches": 2, "masking_rate": rate}
    for held_out in held_out_batches(text, VOCABULARY, **WHOLE, **options):
        check_rows(held_out, most)


def test_tokens_that_are_not_masked_are_unchanged() -> None:
    """Also where a row has fewer words that fit than positions to mask."""
    text = np.array([A, C, C, C, C, C, C, C, C, C] * 40)
    batch = masked_batch(text, VOCABULARY, **WHOLE, step=0, batch_size=20)
    unmasked = batch["masked_weights"] == 0
    assert unmasked.any()
    shown = np.take_along_axis(batch["input_ids"], batch["masked_positions"], axis=1)
    np.testing.assert_array_equal(shown[unmasked], batch["masked_targets"][unmasked])


def test_each_word_of_a_row_is_equally_likely() -> None:
    row = np.array([[CLS, A, C, B, D, A, C, B, D, SEP]])
    random = np.random.default_rng(0)
    counts = np.zeros(4)
    for _ in range(2000):
        special = np.isin(row, VOCABULARY.special)
        begins = words.starts(row, special, VOCABULARY)
        counts += words.chosen(begins, random.random(row.shape) + special, 4)[0, 1:9:2]
    # Two of four words; five standard deviations of a binomial count.
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(2000 / 4)
