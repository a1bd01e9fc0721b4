"""Chooses whole words to mask: a word is a token with the ``##`` tokens that follow it."""

import numpy as np
import numpy.typing as npt

from optim_zoo.train.tasks.bert.vocabulary import Vocabulary


def starts(
    input_ids: npt.NDArray[np.int32], special: npt.NDArray[np.bool_], vocabulary: Vocabulary
) -> npt.NDArray[np.bool_]:
    """Returns whether a token begins a word, ``(batch, sequence)``; a special one always does."""
    begins = special | ~vocabulary.continues[input_ids]
    begins[:, 1:] |= special[:, :-1]
    begins[:, 0] = True
    return begins


def chosen(
    begins: npt.NDArray[np.bool_], keys: npt.NDArray[np.float64], most: int
) -> npt.NDArray[np.bool_]:
    """Returns the positions of the words that are chosen, at most ``most`` in a row.

    Words are taken in the order of the keys of their first pieces. One that does not fit any more
    is passed over, as is one whose key is 1 or more. All arrays are ``(batch, sequence)``.
    """
    rows, columns = np.nonzero(begins)
    word = np.cumsum(begins, axis=1) - 1  # the number of the word at each position
    word_keys = np.full(begins.shape, np.inf)
    word_keys[rows, word[rows, columns]] = keys[rows, columns]
    sizes = np.zeros(begins.shape, np.int64)
    every = np.arange(len(begins))
    np.add.at(sizes, (every[:, None], word), 1)
    order = np.argsort(word_keys, axis=1)
    taken = np.zeros(begins.shape, bool)
    room = np.full(len(begins), most)
    for next_word in order.T:
        size = sizes[every, next_word]
        fits = (word_keys[every, next_word] < 1) & (size <= room)
        taken[every, next_word] = fits
        room -= size * fits
    return np.take_along_axis(taken, word, axis=1)
