"""The tagged sentences of a run: those to train on, those to evaluate on, and their labels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from optim_zoo.errors import UserError
from optim_zoo.train.files import replace_file
from optim_zoo.train.run_folder import saved_steps
from optim_zoo.train.tasks.bert.vocabulary import digest_of
from optim_zoo.train.tasks.token_tagging import conll, python_source
from optim_zoo.train.tasks.token_tagging.conll import Sentence
from optim_zoo.train.tasks.token_tagging.sections import Data

_LABELS = "labels.json"  # in the cache folder


class Corpus(NamedTuple):
    """Tagged sentences."""

    train: list[Sentence]
    held_out: list[Sentence]
    labels: tuple[str, ...]  # in the order of their ids
    digest: str  # hex SHA-256 of all words and tags


def load(data: Data, cache: Path) -> Corpus:
    """Returns the corpus of a config, whose labels ``cache`` keeps for `saved_labels`.

    The labels are those of the training part, in alphabetical order. A run that has a checkpoint
    keeps the labels that it began with.

    Args:
      data: the section of the config.
      cache: a folder inside of the run folder; it is created.

    Raises:
      UserError: the files cannot be used, the training part has only one label, or the held-out
        part has a label that the training part does not have.
    """
    train, held_out = _parts(data, cache)
    found = tuple(sorted({tag for sentence in train for tag in sentence.tags}))
    if len(found) < 2:
        raise UserError(
            f"text: expected at least two labels in column {data.tag_column}, but every word has "
            f"the label {found[0]!r}; correct data.tag_column or add text."
        )
    begun = bool(saved_steps(cache.parent)) and (cache / _LABELS).exists()
    labels = saved_labels(cache) if begun else found
    _check_known(train, labels, "text", data)
    _check_known(held_out, labels, "held_out_text" if data.held_out_text else "text", data)
    if not begun:
        cache.mkdir(parents=True, exist_ok=True)
        replace_file(cache / _LABELS, json.dumps(labels, indent=0).encode())
    return Corpus(train, held_out, labels, digest_of(map(conll.write, (train, held_out))))


def saved_labels(cache: Path) -> tuple[str, ...]:
    """Returns the labels that a run keeps in its cache folder, without reading its data.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        labels = json.loads((cache / _LABELS).read_text(encoding="utf-8"))
        if not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
            raise ValueError(labels)
    except (OSError, ValueError) as error:
        raise UserError(
            f"labels: expected the labels of the run in {cache / _LABELS}, but the file is missing "
            "or damaged; start the command that trained the run again, which writes it anew."
        ) from error
    return tuple(labels)


def split(sentences: Sequence[Sentence], held_out: float) -> tuple[list[Sentence], list[Sentence]]:
    """Returns the sentences to train on and those to hold out.

    A sentence is held out if the hash of its words, as a number in [0, 1), is below ``held_out``,
    so that equal sentences are in the same part. Sentences with a label that the others do not have
    are moved to the training part. If this leaves a part empty, the last sentence is held out.

    Args:
      sentences: at least two.
      held_out: the fraction of the sentences to hold out, in (0, 1).
    """
    hashes = [int(digest_of(sentence.words)[:13], 16) / 16**13 for sentence in sentences]
    train = [each for each, number in zip(sentences, hashes, strict=True) if number >= held_out]
    rest = [each for each, number in zip(sentences, hashes, strict=True) if number < held_out]
    known = {tag for sentence in train for tag in sentence.tags}
    train += [sentence for sentence in rest if not known.issuperset(sentence.tags)]
    rest = [sentence for sentence in rest if known.issuperset(sentence.tags)]
    return (train, rest) if train and rest else (list(sentences[:-1]), list(sentences[-1:]))


def _parts(data: Data, cache: Path) -> tuple[list[Sentence], list[Sentence]]:
    """Returns the sentences to train on and those to evaluate on."""

    def read(key: str) -> list[Sentence]:
        return conll.read(
            getattr(data, key),
            key=key,
            word_column=data.word_column,
            tag_column=data.tag_column,
        )

    if data.text == "":
        made = python_source.load(cache, data.held_out)
        return made.train, read("held_out_text") if data.held_out_text else made.held_out
    sentences = read("text")
    if data.held_out_text:
        return sentences, read("held_out_text")
    if len(sentences) < 2:
        raise UserError(
            "text: expected at least two sentences, one of them to hold out, but there is only "
            "one; put a blank line after every sentence, or name data.held_out_text."
        )
    return split(sentences, data.held_out)


def _check_known(
    sentences: Sequence[Sentence], labels: Sequence[str], key: str, data: Data
) -> None:
    """Raises `UserError` if a sentence has a label that is not among ``labels``."""
    known = set(labels)
    for sentence in sentences:
        for word, tag in zip(*sentence, strict=True):
            if tag not in known:
                raise UserError(
                    f"{key}: expected only labels that the training data has, but {word!r:.40} has "
                    f"the label {tag!r:.40}; the labels are {_listed(labels)}: correct the label, "
                    f"or data.tag_column, which is {data.tag_column}."
                )


def _listed(labels: Sequence[str], most: int = 12) -> str:
    return ", ".join(labels[:most]) + (f" and {len(labels) - most} more" * (len(labels) > most))
