"""Tags the words of a text with a trained model."""

from collections.abc import Iterator, Sequence

import numpy as np

from optim_zoo.errors import UserError
from optim_zoo.train.tasks.bert.loaded import LoadedBert
from optim_zoo.train.tasks.bert.vocabulary import Vocabulary
from optim_zoo.train.tasks.token_tagging import batches, conll, python_source
from optim_zoo.train.tasks.token_tagging.conll import Sentence
from optim_zoo.train.tasks.token_tagging.sections import Data

_ROWS = 32  # sequences of one call of the model


def tag(
    loaded: LoadedBert,
    sentences: Sequence[Sequence[str]],
    labels: Sequence[str],
    vocabulary: Vocabulary,
    *,
    sequence_length: int,
    top: int = 0,
) -> Iterator[str]:
    """Yields a line ``word<TAB>tag`` for each word, and a blank line between two sentences.

    Args:
      loaded: the trained model.
      sentences: the words of each sentence.
      labels: the labels in the order of their ids.
      vocabulary: the WordPieces.
      sequence_length: the number of tokens that the model was trained on; a longer sentence is cut
        between words.
      top: how many labels to add with their probabilities, in descending order:
        ``word<TAB>tag<TAB>tag 0.9120, other 0.0312``.
    """
    unknown = [Sentence(tuple(words), ("",) * len(words)) for words in sentences]
    examples = batches.encode(unknown, {"": 0}, vocabulary, sequence_length)
    rows = [example for each in examples for example in each]
    scores = (
        row
        for start in range(0, len(rows), _ROWS)
        for row in _scores(loaded, rows[start : start + _ROWS], vocabulary, sequence_length)
    )
    for number, (words, parts) in enumerate(zip(sentences, examples, strict=True)):
        if number:
            yield ""
        logits = np.concatenate([next(scores) for _ in parts])
        for word, of_word in zip(words, logits, strict=True):
            order = np.argsort(-of_word, kind="stable")
            line = f"{word}\t{labels[order[0]]}"
            if top:
                shares = np.exp(of_word - of_word.max())
                shares /= shares.sum()
                line += "\t" + ", ".join(f"{labels[i]} {shares[i]:.4f}" for i in order[:top])
            yield line


def read(lines: Sequence[str], data: Data, labels: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the words of each sentence of a text.

    The text is in CoNLL format if each of its lines has a tab, has a single word, or ends with a
    label. Otherwise it is Python source for a run that was trained on the library's source, and for
    other runs plain text with a sentence in each line, whose words are separated by blanks.

    Args:
      lines: the text.
      data: the section of the run's config.
      labels: the labels of the run.

    Raises:
      UserError: there are no words, or Python source is expected and the text is none.
    """
    full = [line for line in lines if line.strip()]
    columns = [line.split() for line in full]
    tabs = all("\t" in line for line in full)
    tagged = all(
        len(fields) > 1 and fields[-1] in {*labels, "-DOCSTART-", "O"} for fields in columns
    )
    if tabs or tagged:
        sentences = conll.words_only("\n".join(lines), data.word_column)
    elif data.text == "":
        try:
            source = "".join(f"{line}\n" for line in lines)
            sentences = [each.words for each in python_source.sentences(source, tagged=False)]
        except SyntaxError as error:
            raise UserError(
                f"expected Python source, on which this run was trained, or lines of CoNLL format, "
                f"but the text is neither ({error}); correct it"
            ) from error
    elif all(len(line.split()) == 1 for line in full):
        sentences = conll.words_only("\n".join(lines))
    else:
        sentences = [tuple(line.split()) for line in full]
    if not sentences:
        raise UserError("expected words to tag, but the text has none in the column of the words")
    return sentences


def _scores(
    loaded: LoadedBert,
    examples: Sequence[batches.Example],
    vocabulary: Vocabulary,
    sequence_length: int,
) -> list[np.ndarray]:
    """Returns the logits of the words of each example, ``(words, labels)``."""
    batch = batches.padded(examples, vocabulary, sequence_length, _ROWS)
    logits = np.asarray(loaded.apply(batch["input_ids"], batch["attention_mask"]))
    return [row[example.positions] for row, example in zip(logits, examples, strict=False)]
