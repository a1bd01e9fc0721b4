"""BERT's masked batches, each a pure function of seed and step.

A resumed run therefore needs nothing but its step number to continue reading.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from optim_zoo.train.random_numbers import generator
from optim_zoo.train.tasks.base import Batch
from optim_zoo.train.tasks.bert.sections import MIN_SEQUENCE_LENGTH
from optim_zoo.train.tasks.bert.vocabulary import Tokens, Vocabulary
from optim_zoo.train.tasks.masked_language import words

MASKED_FRACTION = 0.15  # this and the next two: BERT, arXiv 1810.04805, section 3.1
REPLACED_BY_MASK = 0.8
REPLACED_BY_RANDOM = 0.1

# Philox counters start at (0, 0, 0, stream), so that no two purposes share random numbers.
TRAINING_STREAM = 0
HELD_OUT_STREAM = 1
DROPOUT_STREAM = 2


def masked_batch(
    tokens: Tokens,
    vocabulary: Vocabulary,
    *,
    seed: int,
    step: int,
    batch_size: int,
    sequence_length: int,
    masking_rate: float = MASKED_FRACTION,
    whole_words: bool = False,
) -> Batch:
    """Returns training batch number ``step``.

    A row is a window of consecutive tokens that starts at a random position. It is split at a
    random position into A and B, and written as ``[CLS] A [SEP] B [SEP]``. Exactly
    ``num_masked = max(1, round(masking_rate * sequence_length))`` positions that hold no special
    token are chosen. Of these, 80 % become [MASK], 10 % become a random token that is not special,
    and 10 % stay unchanged, each independently of the others.

    With ``whole_words`` words are chosen in a random order, each with all of its pieces, and a word
    that would exceed ``num_masked`` is passed over, as in ``create_pretraining_data.py`` of
    google-research/bert. The row may thus have a few positions of weight 0. A word is a token with
    the ``##`` tokens that follow it; a special token ends it.

    Args:
      tokens: the training tokens, ``(num_tokens,)``.
      vocabulary: their vocabulary.
      seed: the seed of the run, in [0, 2**64). The random numbers are those of
        ``Philox(key=[seed, step], counter=[0, 0, 0, 0])``.
      step: the number of the batch, in [0, 2**64).
      batch_size: the number of rows.
      sequence_length: the number of tokens of a row, at least 8.
      masking_rate: the share of the tokens that are masked, in (0, 1).
      whole_words: whether all pieces of a word are masked together.

    Returns:
      The arrays of the batch, by name:

      - ``input_ids``: ``(batch, sequence)`` int32.
      - ``type_ids``: ``(batch, sequence)`` int32, 0 for ``[CLS] A [SEP]`` and 1 for ``B [SEP]``.
      - ``masked_positions``: ``(batch, num_masked)`` int32, in ascending order.
      - ``masked_targets``: ``(batch, num_masked)`` int32, the tokens before masking.
      - ``masked_weights``: ``(batch, num_masked)`` float32; 1, or 0 where the token is not masked,
        because a row has too few that may be.

    Raises:
      ValueError: seed, step or sequence length is out of range, or there are fewer tokens than one
        window needs.
    """
    width = _window(tokens, sequence_length)
    random = generator(seed, step, TRAINING_STREAM)
    starts = random.integers(0, len(tokens) - width + 1, size=batch_size)
    return _masked(tokens, vocabulary, starts, sequence_length, random, masking_rate, whole_words)


def held_out_batches(
    tokens: Tokens,
    vocabulary: Vocabulary,
    *,
    seed: int,
    batch_size: int,
    sequence_length: int,
    num_batches: int,
    masking_rate: float = MASKED_FRACTION,
    whole_words: bool = False,
) -> Iterator[Batch]:
    """Yields the batches of an evaluation, shaped and masked as by `masked_batch`.

    The windows follow one another from the start of ``tokens``: as many as exist, but at most
    ``num_batches * batch_size``. The last batch is padded with rows of weight 0. Window ``i`` has
    the random numbers of ``Philox(key=[seed, i], counter=[0, 0, 0, 1])`` for every batch size, so
    that runs of different batch sizes are evaluated on the same data.

    Args:
      tokens: the held-out tokens, ``(num_tokens,)``.
      vocabulary: their vocabulary.
      seed: the seed of the run, in [0, 2**64).
      batch_size: the number of rows of a batch.
      sequence_length: the number of tokens of a row, at least 8.
      num_batches: the largest number of batches.
      masking_rate: see `masked_batch`.
      whole_words: see `masked_batch`.

    Raises:
      ValueError: see `masked_batch`.
    """
    width = _window(tokens, sequence_length)
    windows = min(len(tokens) // width, num_batches * batch_size)
    for first in range(0, windows, batch_size):
        rows = [
            _masked(
                tokens,
                vocabulary,
                np.array([window * width]),
                sequence_length,
                generator(seed, window, HELD_OUT_STREAM),
                masking_rate,
                whole_words,
            )
            for window in range(first, min(first + batch_size, windows))
        ]
        # Real text instead of [PAD], with which attention might have nothing to attend to.
        filler = {**rows[0], "masked_weights": np.zeros_like(rows[0]["masked_weights"])}
        rows += [filler] * (batch_size - len(rows))
        yield {name: np.concatenate([row[name] for row in rows]) for name in filler}


def unigram_loss(train: Tokens, vocabulary: Vocabulary, batches: Iterable[Batch]) -> float:
    """Returns the loss of predicting each masked target by its frequency in the training tokens.

    This is the cross entropy in nats, with the mean over the targets ``t`` of weight 1 and the sum
    over the tokens ``s`` that are not special::

        loss = mean of -log p(t),  p(t) = (count(t) + 1) / sum of (count(s) + 1)

    A model that has learned nothing but frequencies has this loss.

    Args:
      train: the training tokens.
      vocabulary: their vocabulary.
      batches: the batches of an evaluation.

    Raises:
      ValueError: no target has a weight.
    """
    counts = _counts(train, vocabulary) + 1.0
    special = list(vocabulary.special)
    losses = np.log(counts.sum() - counts[special].sum()) - np.log(counts)
    losses[special] = np.inf  # never a target
    total = weight = 0.0
    for batch in batches:
        scored = batch["masked_targets"][batch["masked_weights"] > 0]
        total += losses[scored].sum()
        weight += scored.size
    if weight == 0:
        raise ValueError("batches must hold at least one masked target of weight 1, got none")
    return float(total / weight)


def window_width(sequence_length: int) -> int:
    """Returns the number of text tokens in a row: all but [CLS] and two [SEP]."""
    if sequence_length < MIN_SEQUENCE_LENGTH:
        raise ValueError(
            f"sequence_length must be at least {MIN_SEQUENCE_LENGTH}, got {sequence_length}"
        )
    return sequence_length - 3


def _window(tokens: Tokens, sequence_length: int) -> int:
    """Returns the width of a window, and checks that there are enough tokens for one."""
    width = window_width(sequence_length)
    if len(tokens) < width:
        raise ValueError(f"tokens must hold a window of {width}, got {len(tokens)}")
    return width


def _masked(
    tokens: Tokens,
    vocabulary: Vocabulary,
    starts: npt.NDArray[np.int64],
    sequence_length: int,
    random: np.random.Generator,
    masking_rate: float,
    whole_words: bool,
) -> Batch:
    """Returns the batch of the windows that begin at ``starts``, ``(batch,)``."""
    input_ids, type_ids = _rows(tokens, vocabulary, starts, sequence_length, random)
    num_masked = max(1, round(masking_rate * sequence_length))
    special = np.zeros(vocabulary.size, bool)
    special[list(vocabulary.special)] = True
    ineligible = special[input_ids]

    # The positions of the smallest random keys are a uniform choice without replacement. Special
    # tokens have larger keys than all others, so that they are chosen last.
    keys = random.random(input_ids.shape)
    keys += ineligible
    if whole_words:
        begins = words.starts(input_ids, ineligible, vocabulary)
        ineligible = ~words.chosen(begins, keys, num_masked)
        keys += 2 * ineligible
    positions = np.argpartition(keys, num_masked - 1, axis=1)[:, :num_masked]
    positions.sort(axis=1)
    targets = np.take_along_axis(input_ids, positions, axis=1)
    chosen = ~np.take_along_axis(ineligible, positions, axis=1)

    fate = random.random(targets.shape)
    replaced = np.select(
        [fate < REPLACED_BY_MASK, fate < REPLACED_BY_MASK + REPLACED_BY_RANDOM],
        [np.full_like(targets, vocabulary.mask), _random_tokens(vocabulary, targets.shape, random)],
        targets,
    )
    np.put_along_axis(input_ids, positions, np.where(chosen, replaced, targets), axis=1)
    return {
        "input_ids": input_ids,
        "type_ids": type_ids,
        "masked_positions": positions.astype(np.int32),
        "masked_targets": targets,
        "masked_weights": chosen.astype(np.float32),
    }


def _rows(
    tokens: Tokens,
    vocabulary: Vocabulary,
    starts: npt.NDArray[np.int64],
    sequence_length: int,
    random: np.random.Generator,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Returns ``[CLS] A [SEP] B [SEP]`` and type ids, ``(batch, sequence_length)`` int32 each."""
    width = window_width(sequence_length)
    column = np.arange(sequence_length)
    separator = 1 + random.integers(1, width, size=(len(starts), 1))  # column of the first [SEP]
    second = column > separator
    offset = np.clip(column - 1 - second, 0, width - 1)  # in the window; [CLS], [SEP]: any
    ids = tokens[starts[:, None] + offset].astype(np.int32)
    ids[:, 0] = vocabulary.cls
    np.put_along_axis(ids, separator, np.int32(vocabulary.sep), axis=1)
    ids[:, -1] = vocabulary.sep
    return ids, second.astype(np.int32)


def _random_tokens(
    vocabulary: Vocabulary, shape: tuple[int, ...], random: np.random.Generator
) -> npt.NDArray[np.int32]:
    """Returns uniform ids of tokens that are not special.

    They are drawn from a range as long as there are such tokens, and moved past each special id.
    """
    ids = random.integers(0, vocabulary.size - len(vocabulary.special), shape, np.int32)
    for special in vocabulary.special:
        ids += ids >= special
    return ids


def _counts(tokens: Tokens, vocabulary: Vocabulary) -> npt.NDArray[np.int64]:
    """Returns how often each token occurs, ``(vocabulary.size,)``.

    It counts a slice at a time, because the tokens may not fit into memory.
    """
    counts = np.zeros(vocabulary.size, np.int64)
    for start in range(0, len(tokens), 1 << 24):
        counts += np.bincount(tokens[start : start + (1 << 24)], minlength=vocabulary.size)
    return counts
