"""Make optim_zoo/train/vocabulary.txt, 4,096 WordPiece tokens of the standard library's prose.

    python scripts/make_vocabulary.py

The trainer of `tokenizers` breaks ties between equally good merges in an order that changes from
run to run, so two runs give two vocabularies: that is why the result is committed, and why losses
of runs with different vocabularies must not be compared. Prints one JSON line with the share of
[UNK] among the tokens of that prose.
"""

import json
import string
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from optim_zoo.train import text
from optim_zoo.train.vocabulary import SPECIAL_TOKENS, encode, read_vocabulary

SIZE = 4096
PATH = Path(__file__).parent.parent / "optim_zoo" / "train" / "vocabulary.txt"
TYPOGRAPHY = "\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}\N{EN DASH}“”—…"
# Printable ASCII after lowercasing and what typesetters add, so that [UNK] is rare in English.
ALPHABET = sorted(string.ascii_lowercase + string.digits + string.punctuation + TYPOGRAPHY)


def main() -> None:
    documents = text.standard_library()
    tokens = train(documents)
    PATH.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")

    vocabulary = read_vocabulary(str(PATH))
    ids = np.concatenate(encode(documents, vocabulary))
    unknown = float(np.mean(ids == vocabulary.unk))
    print(json.dumps({"tokens": vocabulary.size, "corpus": ids.size, "unknown_share": unknown}))


def train(documents: list[str]) -> list[str]:
    """The tokens, the special ones first, then the alphabet, then pieces from most useful on."""
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
