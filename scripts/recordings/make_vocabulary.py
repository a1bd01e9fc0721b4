"""Trains the bundled vocabulary: 4,096 WordPiece tokens of the standard library's documentation.

    python scripts/recordings/make_vocabulary.py

Writes optim_zoo/train/tasks/bert/vocabulary.txt. The trainer of `tokenizers` breaks ties
between equally good merges in an order that changes from run to run, so that two runs give two
vocabularies. Therefore the result is committed. Losses of runs with different vocabularies cannot
be compared.

Prints one JSON line with the share of [UNK] among the tokens of the documentation.
"""

import json
import string
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from optim_zoo.train.tasks.bert import vocabulary
from optim_zoo.train.tasks.bert.vocabulary import SPECIAL_TOKENS, encode, read_vocabulary
from optim_zoo.train.tasks.masked_language import text

SIZE = 4096
PATH = Path(vocabulary.__file__).with_name("vocabulary.txt")
TYPOGRAPHY = "\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}\N{EN DASH}“”—…"
# Printable ASCII after lowercasing, and typographic characters, so that [UNK] is rare in English.
ALPHABET = sorted(string.ascii_lowercase + string.digits + string.punctuation + TYPOGRAPHY)


def main() -> None:
    documents = text.standard_library()
    tokens = train(documents)
    PATH.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")

    made = read_vocabulary(str(PATH))
    ids = np.concatenate(encode(documents, made))
    unknown = float(np.mean(ids == made.unk))
    print(json.dumps({"tokens": made.size, "corpus": ids.size, "unknown_share": unknown}))


def train(documents: list[str]) -> list[str]:
    """Returns the special tokens, then the alphabet, then the pieces in the order of the merges."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ALPHABET,
        limit_alphabet=len(ALPHABET),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


if __name__ == "__main__":
    main()
