"""Tagged sentences as padded batches of tokens."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from optim_zoo.train.tasks.base import Batch
from optim_zoo.train.tasks.bert.vocabulary import Vocabulary, tokenizer
from optim_zoo.train.tasks.token_tagging.conll import Sentence

_SPECIAL = 2  # [CLS] and [SEP]


class Example(NamedTuple):
    """One sequence of tokens, without padding: a sentence, or a part of a longer one."""

    ids: npt.NDArray[np.int32]  # (tokens,): [CLS], the pieces of the words, [SEP]
    positions: npt.NDArray[np.int32]  # (words,): the place in ids of each word's first piece
    labels: npt.NDArray[np.int32]  # (words,)


class Pieces:
    """Encodes words as the ids of their WordPieces; each distinct word is encoded once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer(vocabulary)
        self._known: dict[str, list[int]] = {}

    def of(self, words: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each word's pieces, which are [UNK] for a word without any."""
        new = list(dict.fromkeys(word for word in words if word not in self._known))
        encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
        for word, encoding in zip(new, encodings, strict=True):
            self._known[word] = encoding.ids or [self._vocabulary.unk]
        return [self._known[word] for word in words]


def encode(
    sentences: Sequence[Sentence],
    label_ids: Mapping[str, int],
    vocabulary: Vocabulary,
    sequence_length: int,
) -> list[list[Example]]:
    """Returns the examples of each sentence.

    A sentence of more than ``sequence_length`` tokens becomes several examples, cut between words.
    Of a word that is longer than a whole sequence, the first pieces are kept.

    Args:
      sentences: the words and their tags. ``label_ids`` has every tag.
      label_ids: the id of each label.
      vocabulary: the WordPieces.
      sequence_length: the largest number of tokens of an example, including [CLS] and [SEP].
    """
    pieces = Pieces(vocabulary)
    pieces.of([word for sentence in sentences for word in sentence.words])
    return [
        [
            _example(part, labels, vocabulary)
            for part, labels in _parts(
                pieces.of(sentence.words),
                [label_ids[tag] for tag in sentence.tags],
                sequence_length - _SPECIAL,
            )
        ]
        for sentence in sentences
    ]


def padded(
    examples: Sequence[Example], vocabulary: Vocabulary, sequence_length: int, rows: int
) -> Batch:
    """Returns examples as a batch.

    Args:
      examples: at least one and at most ``rows``. The rows that they do not fill repeat the first
        one, with weights of 0.
      vocabulary: the WordPieces.
      sequence_length: the number of tokens of a row.
      rows: the number of rows.

    Returns:
      The arrays of the batch, by name:

      - ``input_ids``: ``(rows, sequence)`` int32, padded with [PAD].
      - ``attention_mask``: ``(rows, sequence)`` int32; 1 for tokens, 0 for padding.
      - ``word_positions``: ``(rows, sequence - 2)`` int32, the place of each word's first piece;
        0 for padding.
      - ``labels``: ``(rows, sequence - 2)`` int32; 0 for padding.
      - ``word_weights``: ``(rows, sequence - 2)`` float32; 1 for words, 0 for padding.
    """
    words = (rows, sequence_length - _SPECIAL)
    batch = {
        "input_ids": np.full((rows, sequence_length), vocabulary.pad, np.int32),
        "attention_mask": np.zeros((rows, sequence_length), np.int32),
        "word_positions": np.zeros(words, np.int32),
        "labels": np.zeros(words, np.int32),
        "word_weights": np.zeros(words, np.float32),
    }
    for row in range(rows):
        example = examples[row] if row < len(examples) else examples[0]
        tokens, count = len(example.ids), len(example.labels)
        batch["input_ids"][row, :tokens] = example.ids
        batch["attention_mask"][row, :tokens] = 1
        batch["word_positions"][row, :count] = example.positions
        batch["labels"][row, :count] = example.labels
        batch["word_weights"][row, :count] = row < len(examples)
    return batch


def _parts(
    words: Sequence[list[int]], labels: Sequence[int], most: int
) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Yields consecutive words with at most ``most`` pieces together, and their labels."""
    start = size = 0
    for index, pieces in enumerate(words):
        length = min(len(pieces), most)
        if size + length > most:
            yield [word[:most] for word in words[start:index]], list(labels[start:index])
            start, size = index, 0
        size += length
    yield [word[:most] for word in words[start:]], list(labels[start:])


def _example(words: Sequence[list[int]], labels: list[int], vocabulary: Vocabulary) -> Example:
    lengths = [len(word) for word in words]
    return Example(
        np.array(
            [vocabulary.cls, *(id for word in words for id in word), vocabulary.sep], np.int32
        ),
        np.cumsum([1, *lengths[:-1]], dtype=np.int32),
        np.array(labels, np.int32),
    )
