"""A small text and vocabulary that several tests share."""

from pathlib import Path

import numpy as np

from optim_zoo.train.tasks.bert.vocabulary import SPECIAL_TOKENS, Vocabulary
from optim_zoo.train.tasks.masked_language.batches import Batch

WORDS = ["the", "learning", "rate", "of", "a", "layer", "grows", "##s", "with", "its", "norm", "."]
SENTENCE = "the learning rate of a layer grows with its norm . "
PLAIN_WORDS = "the learning rate of a layer grows with its norm and every batch is made from text"


def write_vocabulary(path: Path, tokens: list[str]) -> str:
    path.write_text("".join(f"{token}\n" for token in tokens))
    return str(path)


def write_random_text(folder: Path) -> None:
    """Writes thirty documents of random words, ``*.txt``, and their ``vocabulary``."""
    words = PLAIN_WORDS.split()
    rng = np.random.default_rng(0)
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(" ".join(rng.choice(words, 150)))
    write_vocabulary(folder / "vocabulary", [*SPECIAL_TOKENS, *words])


def restored(batch: Batch) -> np.ndarray:
    """Returns the input ids with the targets in place of the masked tokens."""
    ids = batch["input_ids"].copy()
    np.put_along_axis(ids, batch["masked_positions"], batch["masked_targets"], axis=1)
    return ids


def windows(batch: Batch, vocabulary: Vocabulary) -> list[list[int]]:
    """Returns the text of each row, without [CLS] and the [SEP] after A and B."""
    rows = []
    for row, types in zip(restored(batch), batch["type_ids"], strict=True):
        cut = int(np.argmax(types))  # B begins
        assert row[0] == vocabulary.cls
        assert row[cut - 1] == row[-1] == vocabulary.sep
        assert cut > 2
        assert cut < len(row) - 1
        assert types.tolist() == [0] * cut + [1] * (len(row) - cut)
        rows.append([*row[1 : cut - 1].tolist(), *row[cut:-1].tolist()])
    return rows
