"""Masked batches and evaluation."""

import math
from pathlib import Path

import numpy as np
import pytest

from optim_zoo.train.random_numbers import generator
from optim_zoo.train.tasks.bert.vocabulary import (
    SPECIAL_TOKENS,
    Tokens,
    Vocabulary,
    read_vocabulary,
)
from optim_zoo.train.tasks.masked_language.batches import (
    HELD_OUT_STREAM,
    TRAINING_STREAM,
    Batch,
    _random_tokens,
    held_out_batches,
    masked_batch,
    unigram_loss,
)
from tests.train.tasks.masked_language.small_text import restored, windows, write_vocabulary


@pytest.fixture(scope="module")
def tokens(vocabulary: Vocabulary) -> Tokens:
    """Returns tokens that equal their positions, with a [SEP] at every hundredth position."""
    ordinary = np.setdiff1d(np.arange(vocabulary.size), vocabulary.special)
    stream = np.tile(ordinary, 3).astype(np.uint16)
    stream[50::100] = vocabulary.sep
    return stream


def test_batches_have_the_promised_shapes(tokens: Tokens, vocabulary: Vocabulary) -> None:
    batch = masked_batch(tokens, vocabulary, seed=0, step=0, batch_size=7, sequence_length=64)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "input_ids": ((7, 64), "int32"),
        "type_ids": ((7, 64), "int32"),
        "masked_positions": ((7, 10), "int32"),
        "masked_targets": ((7, 10), "int32"),
        "masked_weights": ((7, 10), "float32"),
    }
    assert (np.diff(batch["masked_positions"], axis=1) > 0).all()


def test_a_batch_is_a_pure_function_of_seed_and_step(
    tokens: Tokens, vocabulary: Vocabulary
) -> None:
    def batch(seed: int, step: int) -> Batch:
        return masked_batch(
            tokens, vocabulary, seed=seed, step=step, batch_size=4, sequence_length=32
        )

    first = batch(1, 2)
    batch(5, 6)
    again = batch(1, 2)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    for other in (batch(1, 3), batch(2, 2), batch(2, 1)):
        assert (restored(other) != restored(first)).any(axis=1).all()


def test_targets_written_back_give_a_window_of_the_text(
    tokens: Tokens, vocabulary: Vocabulary
) -> None:
    batch = masked_batch(tokens, vocabulary, seed=3, step=0, batch_size=64, sequence_length=40)
    there = {tuple(row) for row in np.lib.stride_tricks.sliding_window_view(tokens, 37).tolist()}
    rows = windows(batch, vocabulary)
    assert {tuple(row) for row in rows} <= there
    assert any(vocabulary.sep in row for row in rows)


def test_windows_start_and_are_split_at_every_position(vocabulary: Vocabulary) -> None:
    stream = np.arange(100, 108, dtype=np.uint16)
    batch = masked_batch(stream, vocabulary, seed=0, step=0, batch_size=500, sequence_length=8)
    assert {row[0] for row in windows(batch, vocabulary)} == {100, 101, 102, 103}
    assert set(np.argmax(batch["type_ids"], axis=1).tolist()) == {3, 4, 5, 6}


def test_special_tokens_are_never_masked(tokens: Tokens, vocabulary: Vocabulary) -> None:
    stream = tokens.copy()
    stream[::3] = np.resize(vocabulary.special, len(stream[::3]))
    batch = masked_batch(stream, vocabulary, seed=0, step=0, batch_size=256, sequence_length=64)
    assert (batch["masked_weights"] == 1).all()
    assert not np.isin(batch["masked_targets"], vocabulary.special).any()


def test_positions_are_equally_likely(vocabulary: Vocabulary) -> None:
    stream = np.full(500, 1000, np.uint16)
    rows, length = 20_000, 20
    batch = masked_batch(
        stream, vocabulary, seed=0, step=0, batch_size=rows, sequence_length=length
    )
    counts = np.bincount(batch["masked_positions"].ravel(), minlength=length)
    assert counts[0] == counts[-1] == 0
    # Three of 17 eligible positions are chosen. Each column from the third to the third last holds
    # the inner [SEP] in one row of 16. The limit is five standard deviations of a binomial count.
    probability = (
        3 / 17 * np.where(np.isin(np.arange(length), [0, 1, length - 2, length - 1]), 1, 15 / 16)
    )
    deviation = np.sqrt(rows * probability * (1 - probability))
    assert (np.abs(counts - rows * probability)[1:-1] < 5 * deviation[1:-1]).all()


def test_masked_tokens_are_replaced_80_10_10(tokens: Tokens, vocabulary: Vocabulary) -> None:
    batch = masked_batch(tokens, vocabulary, seed=0, step=0, batch_size=2048, sequence_length=128)
    shown = np.take_along_axis(batch["input_ids"], batch["masked_positions"], axis=1)
    targets = batch["masked_targets"]
    masked, kept = shown == vocabulary.mask, shown == targets
    random = ~masked & ~kept
    for share, expected in ((masked, 0.8), (random, 0.1), (kept, 0.1)):
        # Positions are drawn independently, so the count is binomial; the limit is five standard
        # deviations. Random tokens that equal the target (1 in 4,091) change it by 0.04 deviations.
        bound = 5 * math.sqrt(expected * (1 - expected) / share.size)
        assert abs(share.mean() - expected) < bound
    assert not np.isin(shown[random], vocabulary.special).any()
    # Their mean is that of n uniform ids over the whole vocabulary, within five deviations.
    bound = 5 * vocabulary.size / math.sqrt(12 * random.sum())
    assert abs(shown[random].mean() - (5 + vocabulary.size - 1) / 2) < bound


def test_random_tokens_are_never_special(tmp_path: Path) -> None:
    path = write_vocabulary(
        tmp_path / "v", ["[PAD]", "a", "[UNK]", "[CLS]", "b", "[SEP]", "c", "[MASK]", "d"]
    )
    random = np.random.default_rng(0)
    ids = _random_tokens(read_vocabulary(path), (4000,), random)
    counts = np.bincount(ids, minlength=9)
    assert np.flatnonzero(counts).tolist() == [1, 4, 6, 8]
    assert (np.abs(counts[[1, 4, 6, 8]] - 1000) < 5 * math.sqrt(4000 * 0.25 * 0.75)).all()


def test_positions_of_special_tokens_have_weight_zero(vocabulary: Vocabulary) -> None:
    stream = np.full(61, vocabulary.sep, np.uint16)
    stream[[10, 20, 30]] = 500
    batch = masked_batch(stream, vocabulary, seed=0, step=0, batch_size=16, sequence_length=64)
    scored = batch["masked_weights"] == 1
    assert (scored.sum(axis=1) == 3).all()
    assert (batch["masked_targets"][scored] == 500).all()
    assert (np.diff(batch["masked_positions"], axis=1) > 0).all()
    shown = np.take_along_axis(batch["input_ids"], batch["masked_positions"], axis=1)
    np.testing.assert_array_equal(shown[~scored], batch["masked_targets"][~scored])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 7}, "sequence_length must be at least 8, got 7"),
        ({"sequence_length": 1 << 16}, "tokens must hold a window of 65533"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"step": -1}, r"step must be in \[0, 2\*\*64\), got -1"),
    ],
)
def test_batch_arguments_out_of_range_are_refused(
    tokens: Tokens, vocabulary: Vocabulary, changes: dict[str, int], message: str
) -> None:
    arguments = {"seed": 0, "step": 0, "batch_size": 2, "sequence_length": 16, **changes}
    with pytest.raises(ValueError, match=message):
        masked_batch(tokens, vocabulary, **arguments)


def evaluation(
    tokens: Tokens, vocabulary: Vocabulary, batch_size: int, num_batches: int
) -> list[Batch]:
    return list(
        held_out_batches(
            tokens,
            vocabulary,
            seed=4,
            batch_size=batch_size,
            sequence_length=32,
            num_batches=num_batches,
        )
    )


def test_held_out_windows_are_consecutive_and_the_last_batch_is_padded(
    tokens: Tokens, vocabulary: Vocabulary
) -> None:
    stream = tokens[: 29 * 10 + 5]
    batches = evaluation(stream, vocabulary, batch_size=4, num_batches=100)
    assert [batch["input_ids"].shape for batch in batches] == [(4, 32)] * 3
    rows = [row for batch in batches for row in windows(batch, vocabulary)]
    assert [token for row in rows[:10] for token in row] == stream[: 29 * 10].tolist()
    weights = np.concatenate([batch["masked_weights"] for batch in batches])
    assert (weights[:10] == 1).all()
    assert (weights[10:] == 0).all()


def test_held_out_batches_stop_at_num_batches(tokens: Tokens, vocabulary: Vocabulary) -> None:
    batches = evaluation(tokens, vocabulary, batch_size=4, num_batches=2)
    assert len(batches) == 2
    assert all((batch["masked_weights"] == 1).all() for batch in batches)


def test_held_out_batches_do_not_depend_on_the_batch_size(
    tokens: Tokens, vocabulary: Vocabulary
) -> None:
    small = evaluation(tokens, vocabulary, batch_size=2, num_batches=6)
    large = evaluation(tokens, vocabulary, batch_size=6, num_batches=2)
    for name in small[0]:
        np.testing.assert_array_equal(
            np.concatenate([batch[name] for batch in small]),
            np.concatenate([batch[name] for batch in large]),
        )


def test_evaluation_shares_no_random_numbers_with_training() -> None:
    training = generator(1, 2, TRAINING_STREAM).random(4)
    held_out = generator(1, 2, HELD_OUT_STREAM).random(4)
    assert not np.intersect1d(training, held_out).size


def test_unigram_loss_equals_a_computation_by_hand(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v", [*SPECIAL_TOKENS, "a", "b", "c"])
    vocabulary = read_vocabulary(path)
    train = np.array([5, 5, 5, 6, vocabulary.sep, vocabulary.sep, vocabulary.unk], np.uint16)
    batches = [
        {"masked_targets": np.array([[5, 6]]), "masked_weights": np.array([[1.0, 1.0]])},
        {"masked_targets": np.array([[7, 3]]), "masked_weights": np.array([[1.0, 0.0]])},
    ]
    # The counts plus one are 4 (a), 2 (b) and 1 (c), together 7. The last target has no weight.
    expected = (math.log(7 / 4) + math.log(7 / 2) + math.log(7 / 1)) / 3
    assert unigram_loss(train, vocabulary, batches) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="at least one masked target"):
        unigram_loss(train, vocabulary, [])


@pytest.mark.parametrize(("rate", "masked"), [(0.15, 10), (0.4, 26), (0.001, 1)])
def test_the_masking_rate_sets_the_number_of_masked_tokens(
    rate: float, masked: int, tokens: Tokens, vocabulary: Vocabulary
) -> None:
    sizes = {"seed": 0, "step": 1, "batch_size": 3, "sequence_length": 64}
    batch = masked_batch(tokens, vocabulary, **sizes, masking_rate=rate)
    assert batch["masked_positions"].shape == (3, masked)
    assert (batch["masked_weights"] == 1).all()
    if rate == 0.15:
        default = masked_batch(tokens, vocabulary, **sizes)
        assert all(np.array_equal(array, default[name]) for name, array in batch.items())
