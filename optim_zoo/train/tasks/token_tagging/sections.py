"""The data section of a config for token tagging."""

import dataclasses

from optim_zoo import ranges
from optim_zoo.errors import ArgumentValueError
from optim_zoo.train.config import check_size
from optim_zoo.train.tasks.bert.sections import MIN_SEQUENCE_LENGTH


@dataclasses.dataclass(frozen=True)
class Data:
    """The tagged text."""

    text: str = ""  # a glob of CoNLL files to train on; "" is Python source of the standard library
    held_out_text: str = ""  # a glob of CoNLL files to evaluate on; "" holds out a part of text
    held_out: float = 0.1  # the fraction of text that is held out, unless held_out_text is set
    word_column: int = 0  # columns of a CoNLL file count from 0, negative ones from the last
    tag_column: int = -1
    vocabulary: str = ""  # a WordPiece vocabulary, one token per line; "" is the bundled one
    sequence_length: int = 64  # tokens per example, including [CLS] and [SEP]

    def __post_init__(self) -> None:
        ranges.check("held_out", self.held_out, 0.0, 1.0, open_low=True, open_high=True)
        check_size("sequence_length", self.sequence_length, MIN_SEQUENCE_LENGTH)
        for name in ("word_column", "tag_column"):
            check_size(name, getattr(self, name), -(2**20))
        if self.word_column == self.tag_column:
            raise ArgumentValueError(
                "tag_column",
                "differ from word_column",
                self.tag_column,
                related=["word_column"],
            )
